"""`generate`: a prompt continued, and how long that took."""

from clawdemy_infer.cli import arguments
from clawdemy_infer.cli.arguments import Args, UsageError, checked, command, count, idle, option
from clawdemy_infer.cli.output import answer, say
from clawdemy_infer.lesson.tables import si

CACHES = ("contiguous", "paged", "none", "int8", "int4", "window")
"""Names of caches: those of `variants.named_caches`, which would import torch here, and none."""
COLDEST = 1e-3
"""The lowest temperature at which tokens are drawn: logits over it are numbers of fp32 still."""


def add(subparsers) -> None:
    c = command(subparsers, "generate", run,
                "Let the model continue a prompt, and say how long it took.",
                '--prompt "The capital of France is" --max-tokens 16',
                '--chat --prompt "Write a haiku." --temperature 0.8 --top-p 0.9 --seed 1',
                '--prompt "Once upon a time" --weights bf16 --compile --draft lookup')
    option(c, "--prompt TEXT", "what to continue", arguments.words, required=True)
    option(c, "--chat", "put the prompt into the model's chat template", bool)
    option(c, "--max-tokens N", "stop after this many tokens", arguments.tokens, 64)
    option(c, "--stop TEXT", "stop before this text; may be given several times", arguments.words,
           action="append")
    option(c, "--temperature T", "0 is greedy", float, 0.0)
    option(c, "--top-k K", "keep the K likeliest tokens", count)
    option(c, "--top-p P", "keep the likeliest tokens that hold P of the probability", float)
    option(c, "--min-p P", "keep tokens at least P times as likely as the likeliest", float)
    option(c, "--seed N", "the same seed draws the same tokens", int)
    arguments.model_option(c)
    option(c, "--weights", "format of the weights", arguments.RUNS_IN, "fp32")
    option(c, "--cache", "how keys and values are kept; none runs the whole text anew for each "
           "token, window keeps the last 256 and the first 4 of a text without end", CACHES,
           "contiguous")
    option(c, "--draft D", "speculative decoding, the same tokens or drawn from the same "
           "distribution: lookup copies from the text, int8 or int4 is the model in fewer bits, "
           "exit:K its first K layers, trained one layer that goes on from its vectors",
           arguments.draft)
    option(c, "--gamma N", "tokens that are drafted at a time", count, 4)
    arguments.compile_option(c)


def run(args: Args) -> int:
    from clawdemy_infer import model
    from clawdemy_infer.model.generate import prompt_ids
    from clawdemy_infer.speculative import speculate
    from clawdemy_infer.variants import named_caches
    from clawdemy_infer.variants.self_drafts import draft_named
    # 1. What is asked for, refused before the model is loaded.
    if 0 < args.temperature < COLDEST:
        raise UsageError("", "temperature", args.temperature, f"0 (greedy), or {COLDEST} and above")
    idle(args, not args.draft, "without --draft", "--gamma")
    with checked():
        sampling = model.Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
        idle(args, not args.temperature, "with --temperature 0", "--top-k", "--top-p", "--min-p")
    loaded, decoder = models(args)
    with checked():
        ids = prompt_ids(decoder, args.prompt)
        if args.chat:
            ids = decoder.tokenizer.chat([{"role": "user", "content": args.prompt}])
        cache = args.cache
        if cache not in ("contiguous", "paged", "none"):
            cache = named_caches.CACHES[cache](decoder, 1, len(ids) + args.max_tokens)
        more = {"stop": args.stop or [], "cache": cache, "on_token": None if args.json else
                lambda piece: print(piece, end="", flush=True)}
        if args.draft:
            # A copy in fewer bits is made of the weights as they were, not of packed ones.
            source = loaded if args.draft.startswith("int") else decoder
            guess = draft_named(args.draft, source, args.compile)
            result = speculate(decoder, ids, guess, args.max_tokens, sampling, gamma=args.gamma,
                               **more)
        else:
            result = model.generate(decoder, ids, args.max_tokens, sampling, **more)
    if args.json:
        found = vars(result) | {"prompt_tokens": len(result.prompt_tokens)}
        found |= {"rounds": [each._asdict() for each in result.rounds]} if args.draft else {}
        found |= {"compile_s": decoder.runner.compile_s} if args.compile else {}
        answer(True, found)
    else:
        print(flush=True)
        if args.compile:
            say(f"compiled in {si(decoder.runner.compile_s, 's')}, before all other clocks")
        say(f"{len(ids)} prompt tokens, {len(result.tokens)} generated (ended by: "
            f"{result.finish_reason}); TTFT {si(result.ttft_s, 's')}, "
            f"TPOT {si(result.tpot_s, 's')}")
        if args.draft:
            accepted = sum(each.accepted for each in result.rounds)
            say(f"{len(result.rounds)} rounds after the first token: {accepted} of "
                f"{sum(len(each.drafted) for each in result.rounds)} drafted tokens were accepted")
    return 130 if result.finish_reason == "interrupted" else 0


def models(args: Args):
    """The model as it was loaded, and the one that generates."""
    from clawdemy_infer.fast.faster import faster
    from clawdemy_infer.fast.quantized import running
    from clawdemy_infer.machine.calibrate import default_device
    from clawdemy_infer.rigs.checkpoint import is_quantized, load_quantized
    if is_quantized(args.model):
        if args.weights != "fp32" or args.compile:
            raise UsageError("", "weights", args.weights, "none, nor --compile, since "
                             f"{args.model} is quantized already")
        return (running(load_quantized(args.model)),) * 2
    loaded = arguments.load(args.model, device=default_device())
    with checked():
        return loaded, faster(loaded, args.weights, compile=args.compile)
