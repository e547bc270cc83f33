"""One token a row after those in the cache: static shapes, and every length on the device.

`prefill` runs a prompt, `decode` one step. A step reads and writes nothing on the host that changes
from one to the next, so that it can be captured once and replayed; rows may differ in length.
"""

import torch

from ..quant.int8 import Int8
from . import cache as kv
from . import decode_layer, decoder, experts, layer_inputs, mixer, rope, tree
from .attention import Heads, Span
from .cache import Cache
from .layout import Layout
from .norm import norm
from .spec import ModelSpec, MoESpec, RopeSpec


def prefill(
    params: tree.Tree,
    spec: ModelSpec,
    tokens: torch.Tensor,
    cache: Cache,
    *,
    layout: Layout | None = None,
    adapters: tree.Tree = None,
) -> tuple[torch.Tensor, Cache]:
    """Run tokens [b, s] after those in `cache`: logits [b, v] of what follows the last, the cache.

    As in `decoder.extend` the given cache is used up, and padding, if any, stands in front.
    """
    x, cache = decoder.extend(params, spec, tokens, cache, layout=layout, adapters=adapters)
    return decoder.logits(params, spec, x[:, -1], adapters=adapters), cache


def decode(
    params: tree.Tree,
    spec: ModelSpec,
    token: torch.Tensor,
    cache: Cache,
    *,
    adapters: tree.Tree = None,
) -> tuple[torch.Tensor, Cache]:
    """One token [b] a row, at the end of its row: logits [b, v] of what follows, the cache.

    Row i stands at position end[i] - first[i] and sees first[i]..end[i]; the cache must have room
    after every end. As in `decoder.extend` the given cache is used up.
    """
    positions = (cache.end - cache.first)[:, None]
    x = decoder.placed(params, spec, token[:, None], positions)
    at = kv.places(cache)
    cache = kv.stepped(cache, at)
    tables: dict[RopeSpec | None, rope.Table | None] = {None: None}
    tables.update({r: rope.table(r, positions) for r in spec.ropes()})
    sights = {layer.sight for layer in spec.layers}
    seen = {sight: _span(cache, *sight) for sight in sights}
    further = layer_inputs.every(params, spec, token[:, None], x, adapters)
    shared: dict[int | None, Heads] = {}
    for i, (layer, p) in enumerate(zip(spec.layers, params["layers"], strict=True)):
        own, table, sight = tree.get(adapters, "layers", i), tables[layer.rope], seen[layer.sight]
        buffers = (cache.layers[i], at)
        fused = decode_layer.covers(x[:, 0], p, own, table, layer)
        if layer.lends and not fused.attention:
            mixer.lent(x, p, own, table, spec=layer, buffers=buffers)
        if layer.lends:
            shared[i] = cache.layers[i]["keys"], cache.layers[i]["values"]
        heads = shared.get(i if layer.lends else layer.kv_from)
        more = sight, None, heads, further[i]
        if any(fused):
            x = decode_layer.layer(x, p, own, table, *more, fused, spec=layer, buffers=buffers)
        else:
            x = decoder.layer(x, p, own, table, *more, spec=layer, buffers=buffers)
    x = norm(x, params.get("norm"), spec.norm)
    return decoder.logits(params, spec, x[:, 0], adapters=adapters), cache


def waits_for(
    params: tree.Tree, spec: ModelSpec, adapters: tree.Tree = None, seed: int | None = None
) -> str | None:
    """What of a step asks the device for a value, so that no graph can hold it; None: nothing.

    seed: of dropout in training, whichever it is.
    """
    tables = [params[name] for name in ("embed", "inputs") if name in params]
    here = tree.tensors(params["layers"][0])[0].device
    if any(t.device != here for t in tree.tensors(tables)):
        return "which rows of the embedding on the host are used"
    for i, layer in enumerate(spec.layers):
        if isinstance(layer.mlp, MoESpec):
            own = tree.get(adapters, "layers", i, "mlp", "experts")
            if experts.waits_for(params["layers"][i]["mlp"]["experts"], own, layer.mlp, seed):
                return "how many tokens each expert has"
    if any(isinstance(leaf, Int8) for leaf in tree.leaves(params)):
        return "which inputs of an int8 product are outliers"
    if any(table.kind in ("dynamic", "longrope") for table in spec.ropes()):
        return "how long the longest row is, for its frequencies"
    return None


def _span(cache: Cache, window: int | None, chunk: int | None) -> Span:
    """What the last token of every row sees."""
    first = cache.first
    if chunk is not None:
        first = first + (cache.end - 1 - first) // chunk * chunk
    if window is not None:
        first = torch.maximum(first, cache.end - window)
    return Span(first, cache.end, cache.table)
