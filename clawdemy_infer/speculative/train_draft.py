"""Train the draft that is shipped, or one for another model: the target writes, and one layer learns to guess its vectors.

    python -m clawdemy_infer.speculative.train_draft --tokens 150000 --out draft.safetensors

On one core, that others used too, the target wrote some 200 tokens a second, and a step took 0.3 to 0.45 s. The file that is shipped had
less than this, by the command that stands in it: 96,000 tokens and 1,000 steps, of which the last 300, at a falling rate, gained most.

The texts are kept beside the file, in FILE.samples, and the state of the training in FILE.state, every 50 steps: an interrupted
run goes on where it was. Both can be deleted when the draft is done.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from clawdemy_infer.kv_cache import Uncached
from clawdemy_infer.linear import Fast
from clawdemy_infer.model import Decoder, load_model, with_weights
from clawdemy_infer.model.load import DEFAULT_MODEL, PACKAGED
from clawdemy_infer.speculative.draft_samples import Sample, read_samples, write_samples
from clawdemy_infer.speculative.trained import FeatureLayer, save_draft

VOCABULARY = 8192
"""Tokens that the draft can say: those that came most often in the samples. The head is most of what a draft step costs."""
BATCH = 1024
"""Tokens that are learnt from at once."""
FREQUENT = 1024
"""The cross-entropy is over so many tokens, the most frequent, those of the batch, and as many others at random, each of which stands
for all that were not drawn (Jean et al. 2015): a head over all would cost more than the layer."""
OWN = 0.3
"""Share of the features that are the layer's own in training: behind its first guess it has no others (Zhang et al. 2024, HASS)."""
FEATURES = 1.0
"""Weight of the distance between features, beside the cross-entropy of what they say."""


def batches(samples: Sequence[Sample], chance: random.Random) -> list[list[Sample]]:
    """All samples, in batches of like lengths, in a random order."""
    made: list[list[Sample]] = [[]]
    for sample in sorted(samples, key=lambda sample: (len(sample.tokens), chance.random())):
        if made[-1] and (len(made[-1]) + 1) * len(sample.tokens) > BATCH:
            made.append([])
        made[-1].append(sample)
    chance.shuffle(made)
    return made


def linear_guess(layer: FeatureLayer, target: Decoder, samples: Sequence[Sample]) -> None:
    """Begin with the best guess that is linear in both inputs, by least squares, and with a layer that adds nothing to it yet."""
    D = target.config.shape.D
    gram, right = torch.zeros(2 * D, 2 * D), torch.zeros(2 * D, D)
    for sample in samples:
        features = sample.features.float()
        pair = torch.cat((F.rms_norm(features[:-1], (D,)), F.rms_norm(target.embed(sample.tokens[1:].long()), (D,))), -1)
        gram += pair.T @ pair
        right += pair.T @ (features[1:] / target.norm.weight)                   # before the norm's weight: a vector of length √D
    layer.fc.weight.copy_(torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(2 * D), right).T)
    layer.layer.out.weight.zero_()
    layer.layer.down.weight.zero_()


def loss_of(layer: FeatureLayer, target: Decoder, head: torch.Tensor, batch: Sequence[Sample], own: float,
            weight: torch.Tensor | float = 0.0) -> tuple[torch.Tensor, float]:
    """Cross-entropy against the target's own distribution, and the α of sampling, Σ min(p, q), over the vocabulary of `head` [v, D].
    `weight` [v] is the logarithm of how many tokens each of them stands for."""
    tokens = pad_sequence([sample.tokens.long() for sample in batch], batch_first=True)                         # [B, T]
    features = pad_sequence([sample.features.float() for sample in batch], batch_first=True)                    # [B, T, D]
    there = torch.arange(tokens.shape[1]) < torch.tensor([len(sample.tokens) for sample in batch])[:, None]     # [B, T]
    (B, T), embeddings = tokens.shape, target.embed(tokens).flatten(0, 1)

    def forward(theirs: torch.Tensor) -> torch.Tensor:
        step = Uncached(B, T, layer.dtype, tokens.device).begin(dict(enumerate(tokens.tolist())))
        before = torch.cat((torch.zeros_like(theirs[:, :1]), theirs[:, :-1]), 1).flatten(0, 1)
        return target.norm(layer(before, embeddings, step)).view(B, T, -1)

    with torch.no_grad():
        mixed = torch.where(torch.rand(B, T, 1) < own, forward(features), features) if own else features
    guessed, features = forward(mixed)[there], features[there]                                                  # [M, D]
    p, q = ((features @ head.T).float() + weight).softmax(-1), (guessed @ head.T).float() + weight      # [M, v]
    loss = F.cross_entropy(q, p) + FEATURES * F.smooth_l1_loss(guessed, features)
    with torch.no_grad():
        alpha = torch.minimum(p, q.softmax(-1)).sum(-1).mean()
    return loss, float(alpha)


def judge(layer: FeatureLayer, target: Decoder, head: torch.Tensor, samples: Sequence[Sample]) -> float:
    """α of sampling at the first drafted token, over texts that were not learnt from."""
    with torch.no_grad():
        alphas = [(loss_of(layer, target, head, [sample], 0.0)[1], len(sample.tokens)) for sample in samples]
    return sum(alpha * count for alpha, count in alphas) / sum(count for _, count in alphas)


def train(target: Decoder, folder: Path, out: Path, steps: int, seed: int, rate: float, command: str) -> None:
    """`steps` batches by AdamW (Loshchilov and Hutter 2019), at a rate that falls to 0. Norms stay at 1. The draft will say by which
    `command` it was made.
    """
    state = out.with_suffix(".state")
    samples, judges = read_samples(folder)
    if not samples:
        raise ValueError(f"{folder} holds one text, by which the draft would be judged: more tokens are needed to learn from")
    target.requires_grad_(False)
    layer = FeatureLayer(target).requires_grad_(False)
    counts = torch.bincount(torch.cat([sample.tokens for sample in samples]).long(), minlength=target.config.shape.V)
    if resumed := state.exists():
        held = load_file(state)
        with safe_open(state, "pt") as file:
            first = int(file.metadata()["steps"])
        vocabulary = held["vocabulary"].long()
        layer.load_state_dict({name[7:]: weight for name, weight in held.items() if name.startswith("weight.")})
    else:
        vocabulary = counts.argsort(descending=True, stable=True)[:VOCABULARY].sort().values         # of equals the lower, the older merge
        linear_guess(layer, target, samples)
        first = 0
    matrices = {name: weight for name, weight in layer.named_parameters() if weight.dim() == 2}
    optimizer = torch.optim.AdamW([{"params": [weight], "pace": 0.2 if name == "fc.weight" else 1.0} for name, weight in matrices.items()],
                                  betas=(0.9, 0.95), weight_decay=0.01)                      # fc begins near where it will end
    for name, weight in matrices.items():
        weight.requires_grad_(True)
        if resumed:
            mean, square = held[f"mean.{name}"], held[f"square.{name}"]
            optimizer.state[weight] = {"step": torch.tensor(float(first)), "exp_avg": mean, "exp_avg_sq": square}
    for part in layer.modules():
        if isinstance(part, Fast):
            part.forward = F.linear             # a packed layout learns nothing
    target_head = (target.embed if target.config.shape.tied else target.head).weight
    head = target_head[vocabulary]
    frequent = counts.argsort(descending=True)[:FREQUENT]
    name = target.config.shape.name
    about = {"command": command, "target": name, "rate": str(rate), "batch": str(BATCH), "seed": str(seed),
             "target_sha256": PACKAGED[name][2] if name in PACKAGED else "", "tokens": str(int(counts.sum()))}

    def keep(done: int) -> None:
        momenta = {f"{short}.{name}": optimizer.state[weight][long] for name, weight in matrices.items()
                   for short, long in (("mean", "exp_avg"), ("square", "exp_avg_sq"))}
        weights = {f"weight.{name}": weight.detach() for name, weight in layer.state_dict().items()}
        save_file(momenta | weights | {"vocabulary": vocabulary.int()}, state, {"steps": str(done)})
        alpha = judge(layer, target, head, judges[:20])
        save_draft(out, layer, vocabulary, about | {"steps": str(done), "alpha": f"{alpha:.3f}"})
        bar.write(f"step {done}: alpha {alpha:.3f} on texts that were not learnt from")

    chance, queue, average = random.Random(seed + first), [], None
    torch.manual_seed(seed + first)
    with tqdm(total=steps, initial=first, desc="training", unit="step") as bar:
        for at in range(first, steps):
            queue = queue or batches(samples, chance)
            batch = queue.pop()
            present = torch.cat([frequent, *(sample.tokens.long() for sample in batch)]).unique()
            present = present[torch.isin(present, vocabulary)]
            others = vocabulary[~torch.isin(vocabulary, present)]
            drawn = others[torch.randperm(len(others))[:FREQUENT]]
            weight = torch.zeros(len(present) + len(drawn))
            weight[len(present):] = math.log(len(others) / max(1, len(drawn)))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["pace"] * min(1, (at + 1) / 20) * (1 - at / steps)
            with torch.autocast(target.device.type, torch.bfloat16):
                loss, alpha = loss_of(layer, target, target_head[torch.cat((present, drawn))], batch, OWN, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
            average = float(loss.detach()) if average is None else 0.95 * average + 0.05 * float(loss.detach())
            bar.set_postfix(loss=f"{average:.3f}", alpha=f"{alpha:.3f}")
            if (at + 1) % 50 == 0 or at + 1 == steps:
                keep(at + 1)


def make(target: Decoder, out: Path, tokens: int = 150_000, steps: int = 3000, seed: int = 0, rate: float = 5e-4) -> None:
    """Have `target` write, train a draft for it, and save that as `out`."""
    folder = out.with_suffix(".samples")
    write_samples(with_weights(target, "bf16"), folder, tokens, seed)
    options = f"--tokens {tokens} --steps {steps} --rate {rate} --seed {seed} --out {out.name}"
    train(target, folder, out, steps, seed, rate, f"python -m clawdemy_infer.speculative.train_draft {options}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="clawdemy_infer.speculative.train_draft", description="Train a draft for a model.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or path as for `generate` (default: the packaged model)")
    parser.add_argument("--tokens", type=int, default=150_000, help="to write and learn from (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help=f"batches of {BATCH} tokens to learn from (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate, which falls to 0 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the file of the draft, .safetensors")
    args = parser.parse_args(arguments)
    make(load_model(args.model), args.out, args.tokens, args.steps, args.seed, args.rate)


if __name__ == "__main__":
    main()
