"""State-space mixers: a state of fixed size instead of a cache that grows. Mamba (Gu and Dao 2023),
Mamba-2 (Dao and Gu 2024). Gated delta networks (Yang et al. 2024) and Kimi's delta attention (2025)
are Mamba-2 with a correction: what the state already says of a key is taken off the value.
Lightning attention (Qin et al. 2024) has fixed decays, a short convolution (LFM2, 2025) no state.

    h_t = a_t h_{t-1} + (dt_t x_t) B_t      for each of `inner` channels, `state` numbers
    y_t = C_t · h_t

A short convolution over the last `conv` tokens goes before it. Mamba computes dt, B and C from each
channel's input by two thin matrices, and a_t differs for every state; Mamba-2 takes all from one
product, with one a_t for a head of channels. A, B, D and dt are the papers': B is no batch."""

from dataclasses import dataclass

from clawdemy_infer.arithmetic.work import Pass, Work, element_bytes


@dataclass(frozen=True)
class SSM:
    """`inner` channels, `state` numbers for each (0: only the convolution), a convolution over
    `conv` tokens (0: none, and fixed decays). Mamba has `dt_rank`, the width through which dt
    comes; Mamba-2 has `heads`, and `groups` that share B and C. `norms`: dt, B and C are normed
    (Jamba). `delta`: the correction, whose heads have keys of `state` and values of inner/heads
    numbers; with a dt_rank too, by thin matrices. `format`: of the state, if not the cache's."""

    inner: int
    state: int
    conv: int = 4
    dt_rank: int = 0
    heads: int = 0
    groups: int = 1
    norms: bool = False
    delta: bool = False
    format: str = ""

    def __post_init__(self) -> None:
        if self.state and bool(self.dt_rank) == bool(self.heads) and not self.delta:
            raise ValueError(f"dt_rank={self.dt_rank}, heads={self.heads}: one of them is given")


@dataclass(frozen=True)
class StateSpace:
    """One such mixer in a model of width D."""

    D: int
    ssm: SSM
    window = None

    def matrices(self) -> dict[str, tuple[int, int]]:
        """`in` makes the gate beside the channels, and for Mamba-2 B, C and dt too. Around a
        convolution without a state there are two gates."""
        D, s = self.D, self.ssm
        if not s.state:
            return {"in": (D, 3 * s.inner), "out": (s.inner, D)}
        if s.delta and s.dt_rank:
            return {"in": (D, self._conv_channels + s.heads + 2 * s.dt_rank),
                    "dt": (s.dt_rank, 2 * s.inner), "out": (s.inner, D)}
        if s.heads:
            by_head = s.heads * (2 if s.delta else 1 if s.conv else 0)
            return {"in": (D, s.inner + self._conv_channels + by_head), "out": (s.inner, D)}
        return {"in": (D, 2 * s.inner), "x": (s.inner, s.dt_rank + 2 * s.state),
                "dt": (s.dt_rank, s.inner), "out": (s.inner, D)}

    @property
    def _conv_channels(self) -> int:
        """Mamba-2 convolves B and C as well."""
        return self.ssm.inner + (2 * self.ssm.groups * self.ssm.state if self.ssm.heads else 0)

    def vectors(self) -> int:
        s = self.ssm
        if not s.state or not s.conv:           # the convolution, or the norm of what comes out
            return s.inner * max(s.conv, 1)
        if s.delta:                     # A and dt's bias, and the norm of a head; no other bias
            decays = s.heads + (s.inner if s.dt_rank else s.heads)
            return self._conv_channels * s.conv + decays + s.inner // s.heads
        vectors = self._conv_channels * (s.conv + 1)                    # and its bias
        # Mamba-2: A, D and dt's bias by head, and a norm. Mamba: A by state, D and dt's bias.
        vectors += 3 * s.heads + s.inner if s.heads else s.inner * (s.state + 2)
        return vectors + s.norms * (s.dt_rank + 2 * s.state)

    def kept(self, S: int) -> int:
        """The state, and the last inputs of the convolution: the same for every S."""
        return self.ssm.inner * self.ssm.state + self._conv_channels * self.ssm.conv

    def of_rows(self, run: Pass) -> list[Work]:
        return [run.matmul(name, I, O) for name, (I, O) in self.matrices().items()]

    def of_sequences(self, run: Pass) -> list[Work]:
        """Convolution and recurrence, token by token. Kernels that go by chunks do more FLOPs.

        FLOPs a token: 2·conv a convolved channel, and for each state 1 for a·h, 2 to add x·B, 2 for
        C·h, and 2 to make a = exp(dt·A) in Mamba, or for B·h in a correction. Bytes: the state is
        read and written once in a pass, the inputs once for each token."""
        s, channels = self.ssm, self._conv_channels
        steps = 7 if s.delta or not s.heads else 5
        flops = run.tokens * (2 * s.conv * channels + steps * s.inner * s.state)
        state = 2 * run.B * self.kept(run.S) * element_bytes("kv", s.format or run.kv)
        # Channels with B and C, and dt and the gate in; y out.
        inputs = channels + (s.heads if s.heads else 2 * s.state + s.inner) + s.inner
        moved = run.tokens * (inputs + s.inner) * element_bytes("activations", run.activations)
        return [Work(flops, state + moved, "scan", run.activations, "scan", run.T)]
