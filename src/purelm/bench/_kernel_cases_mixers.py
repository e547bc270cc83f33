"""The cases of `purelm bench kernels` for what hybrids have in attention's place: the short
convolution, the scans of Mamba 2 and of gated delta nets, the norm after them, a decoding step.

A scan's operations are those of its recurrence, what a state takes up and gives out; in chunks
there are more.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import delta_rule, gated_norm, short_conv, ssd, ssd_reference, state_step
from ..kernels import delta_rule_reference as delta_reference
from ._kernel_case import EPS, Case, Mixer, Shape, backward, forward, normal
from ._kernel_check import against, near, outputs

# Tokens of a row that a check of a scan looks at.
CHECKED = 256


def convolving(shape: Shape, device: torch.device) -> Iterator[Case]:
    b, s = shape.batch, shape.tokens // shape.batch
    for mixer in shape.mixers:
        channels, values = mixer.channels, shape.tokens * mixer.channels

        def ours(x: Tensor, w: Tensor, silu: bool) -> Tensor:
            return short_conv.short_conv(x, w, silu=silu)

        def reference(x: Tensor, w: Tensor, silu: bool) -> Tensor:
            return short_conv.short_conv_reference(x, w, silu=silu)

        def inputs(c: int, taps: int) -> Any:
            x, dy = (normal(device, b, s, c) for _ in range(2))
            return (x, normal(device, c, taps, std=0.5)), (dy,)

        silu = mixer.kind != "conv"
        f, plain = (partial(g, silu=silu) for g in (ours, reference))
        for name, wanted, of in (("", (), 4), (" backward", (0,), 6)):
            yield Case(
                "short convolution" + name,
                f"{b}x{s}x{channels}, {mixer.taps} taps",
                float(of * values),
                2.0 * mixer.taps * values * (2 if wanted else 1),
                partial(inputs, channels, mixer.taps),
                backward(f, wanted) if wanted else forward(f),
                against(f, plain, wanted, flat=True),
                {"wanted": wanted},
            )


def scanning(shape: Shape, device: torch.device) -> Iterator[Case]:
    for mixer in shape.mixers:
        if mixer.kind != "conv":
            yield from _scan(shape, mixer, device)


def _scan(shape: Shape, mixer: Mixer, device: torch.device) -> Iterator[Case]:
    b, s = shape.batch, shape.tokens // shape.batch
    h, p, g, n = mixer.heads, mixer.head_dim, mixer.groups, mixer.state
    delta = mixer.kind == "delta"

    def rates() -> tuple[Tensor, Tensor]:
        return torch.rand(b, s, h, device=device), -torch.rand(b, s, h, device=device)

    def inputs() -> Any:
        (x, dy), (c, d) = ([normal(device, b, s, *of) for _ in range(2)] for of in ((h, p), (g, n)))
        taken, decay = rates()
        if delta:
            return (c, d, x, taken, decay), (dy,)
        return (x, taken * 0.1, decay, c, d, torch.ones(h, device=device)), (dy,)

    def ours(*args: Tensor) -> Tensor:
        if delta:
            q, k, v, beta, decay = args
            return delta_rule.delta_rule(q, k, v, beta, decay, None, None)[0]
        x, dt, decay, c, d, skip = args
        return ssd.ssd(x, dt, decay, c, d, skip, None, None)[0]

    def plain(*args: Tensor) -> Tensor:
        """The rule in fp64, each head with a key of its own."""
        if delta:
            q, k, v, beta, decay = args
            q, k = (torch.nn.functional.normalize(t, dim=-1, eps=1e-12) for t in (q, k))
            return delta_reference.scan(q * n**-0.5, k, v, beta, decay, None, None)[0]
        x, dt, decay, c, d, skip = args
        y = ssd_reference.scan(x * dt[..., None], decay, c, d, None, None)[0]
        return y + x * skip[:, None]

    def check(args: Sequence[Tensor], ups: Sequence[Tensor], wanted: Sequence[int]) -> None:
        some = [t[:1, :CHECKED] if t.dim() > 1 else t for t in args]
        up = ups[0][:1, :CHECKED]
        mine = outputs(ours, some, [up], wanted)
        exact = outputs(plain, [t.double() for t in some], [up.double()], wanted)
        for i, pair in enumerate(zip(mine, exact, strict=True)):
            near("output" if not i else f"gradient {wanted[i - 1]}", *pair)

    own, shared = shape.tokens * h * p, shape.tokens * g * n
    times = 8.0 * shape.tokens * h  # of both rates
    products = 4.0 * shape.tokens * h * p * n * (2 if delta else 1)
    everything = tuple(range(5))
    for name, wanted, moved in (
        ("", (), 4.0 * own + 4.0 * shared + times),
        (" backward", everything, 6.0 * own + 8.0 * shared + 2 * times),
    ):
        yield Case(
            ("delta rule" if delta else "ssd") + name,
            f"{b}x{s}x{h}x{p}, states of {n}",
            moved,
            products * (2.5 if wanted else 1),
            inputs,
            backward(ours, wanted) if wanted else forward(ours),
            partial(check, wanted=wanted),
            {"wanted": wanted},
        )


def norming_gated(shape: Shape, device: torch.device) -> Iterator[Case]:
    b, s = shape.batch, shape.tokens // shape.batch
    for mixer in shape.mixers:
        if mixer.kind == "conv":
            continue
        d = mixer.heads * mixer.head_dim
        # A delta net's heads each after its norm, Mamba 2's together before it.
        width, first = (mixer.head_dim, True) if mixer.kind == "delta" else (d, False)

        def made(f: Callable[..., Any], width: int, first: bool) -> Callable[..., Any]:
            return lambda y, gate, w: f(y, gate, w, EPS, width, norm_first=first)

        def inputs(d: int, width: int) -> Any:
            y, gate, up = (normal(device, b, s, d) for _ in range(3))
            return (y, gate, 1 + normal(device, width, std=0.1)), (up,)

        f, plain = (
            made(g, width, first) for g in (gated_norm.gated_norm, gated_norm.gated_norm_reference)
        )
        for name, wanted, of in (("", (), 6), (" backward", (0, 1), 10)):
            yield Case(
                "gated norm" + name,
                f"{shape.tokens}x{d // width}x{width}",
                float(of * shape.tokens * d),
                (18.0 if wanted else 9.0) * shape.tokens * d,
                partial(inputs, d, width),
                backward(f, wanted) if wanted else forward(f),
                against(f, plain, wanted),
                {"wanted": wanted},
            )


def stepping(shape: Shape, device: torch.device) -> Iterator[Case]:
    """One token a row: a state is read and written once."""
    for mixer in shape.mixers:
        if mixer.kind == "conv":
            continue
        h, p, g, n = mixer.heads, mixer.head_dim, mixer.groups, mixer.state
        delta = mixer.kind == "delta"

        def run(*args: Tensor, delta: bool) -> tuple[Tensor, Tensor]:
            tensors, state = args[:-1], args[-1]
            step: Callable[..., Tensor] = state_step.delta_step if delta else state_step.ssd_step
            return step(*tensors, *(() if delta else [(0.0, float("inf"))]), None, state), state

        def inputs(b: int, h: int, p: int, g: int, n: int, delta: bool) -> Any:
            x, c, d = (normal(device, b, 1, *of) for of in ((h, p), (g, n), (g, n)))
            rates = [normal(device, b, 1, h) for _ in range(2 if delta else 1)]
            own = [normal(device, h) for _ in range(2 if delta else 3)]
            state = torch.randn(b, h, *((n, p) if delta else (p, n)), device=device)
            return (*((c, d, x, *rates) if delta else (x, *rates, c, d)), *own, state), ()

        def check(args: Sequence[Tensor], _: Any, delta: bool) -> None:
            mine = run(*(t.clone() for t in args), delta=delta)
            exact = run(*(t.double() for t in args), delta=delta)
            for name, pair in zip(("output", "state"), zip(mine, exact, strict=True), strict=True):
                near(name, *pair)

        for b in (1, shape.batch):
            yield Case(
                "delta step" if delta else "ssd step",
                f"{b}x{h}x{p}, states of {n}",
                8.0 * b * h * p * n + 4.0 * b * (h * p + g * n),
                (8.0 if delta else 5.0) * b * h * p * n,
                partial(inputs, b, h, p, g, n, delta),
                forward(partial(run, delta=delta)),
                partial(check, delta=delta),
            )
