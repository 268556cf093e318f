"""Adaptive γ: it finds what pays, gives up what does not, tries again, and changes no
distribution."""

from chi_square import FALSE_ALARM
from test_speculative_exactness import TARGET, Chain, ChainDraft, loop_p_value

from clawdemy_infer.model import Sampling
from clawdemy_infer.speculative import Proposal
from clawdemy_infer.variants.adaptive import Adaptive


class Says:
    """Always guesses 1, 2, 3, ..."""

    def begin(self, target, cache, prompts):
        self.sizes = []

    def propose(self, texts, counts, sampling, generator):
        self.sizes.append(tuple(counts.values()))
        return Proposal([list(range(1, count + 1)) for count in counts.values()])


def sizes(right, rounds, c=0.1, v=lambda rows: 1.0, most=6):
    """How many it asks for, round by round, where so many of the guesses are right."""
    draft, text = Says(), [0]
    adaptive = Adaptive(draft, c, v, most)
    adaptive.begin(None, None, {"a": text})
    for _ in range(rounds):
        guess = adaptive.propose({"a": text}, {"a": 9}, Sampling(), None).tokens[0]
        text += [*guess[:right], 0]
    return [size for (size,) in draft.sizes]


def test_it_finds_how_many_guesses_pay():
    # The first two always stand and the third never: 3 tokens for 1.2, against 2 for 1.1 and 3 for
    # 1.3.
    found = sizes(right=2, rounds=40)
    assert found[0] > 2 and set(found[12:]) <= {2, 3} and found[12:].count(2) > 14
    assert sizes(right=6, rounds=20)[-1] == 6


def test_what_never_stands_is_asked_seldom_and_not_never():
    found = sizes(right=0, rounds=200, c=0.3)
    assert found[-100:].count(0) > 60 and any(found[-100:])


def test_where_rows_are_dear_fewer_are_asked_and_a_batch_makes_them_dear():
    def beyond(rows):
        return max(1.0, rows / 8)

    draft = Says()
    adaptive = Adaptive(draft, 0.02, beyond, 6)
    for B in (1, 2, 8):
        texts = {i: [0] for i in range(B)}
        adaptive.begin(None, None, texts)
        adaptive.propose(texts, dict.fromkeys(texts, 9), Sampling(), None)
        assert len(set(draft.sizes[-1])) == 1
        draft.last = [*getattr(draft, "last", []), draft.sizes[-1][0]]
    assert draft.last[0] > draft.last[1] > draft.last[2] == 0


def test_sampled_text_is_still_the_targets():
    draft = Adaptive(ChainDraft(Chain(4, seed=4, near=TARGET)), 0.1, lambda rows: 1 + 0.02*rows, 3)
    assert loop_p_value(draft, 4, 4_000) > FALSE_ALARM
