"""The weights that generation reads, and whether they are still what they were."""

from functools import reduce

import torch

from ..nn import tree
from .bridge import CausalLM


class LiveWeights:
    """`params` and `adapters` of a model as its passes compute with them, read anew at each `read`.

    content counts the times their values changed; places counts the times that other tensors came
    in their stead, which graphs over the old ones do not follow.
    What is made of the model's own tensors (trained copies in its dtype, adapters less what they
    began with) is made again only when those have changed.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.content = self.places = 0
        self.params: tree.Tree = None
        self.adapters: tree.Tree = None
        self._trees: tuple[tree.Tree, ...] = ()
        self._scheme: str | None = None
        self._tensors: list[torch.Tensor] = []
        self._counted: list[torch.Tensor] = []
        self._seen: tuple[list[int], list[int]] = [], []
        self._norms: list[float] = []

    def read(self, closely: bool = False) -> bool:
        """Look at the model; True where its weights' values are others than at the last look.

        closely: also at the norms of what is trained, which waits for the device: kernels that
        torch knows nothing of, such as those of some optimizers, write without a trace.
        """
        trees = self.model.own_trees()
        other = self._scheme != self.model.qat_scheme or len(trees) != len(self._trees)
        if other or any(a is not b for a, b in zip(trees, self._trees, strict=True)):
            self._trees, self._scheme, other = trees, self.model.qat_scheme, True
            self._tensors = [t for one in trees for t in tree.tensors(one)]
            # A tensor of inference mode cannot be trained, and counts no writes.
            self._counted = [t for t in self._tensors if not t.is_inference()]
        where = [t.data_ptr() for t in self._tensors]
        versions = [t._version for t in self._counted]
        moved = other or where != self._seen[0]
        norms = self._norms_of_trained() if closely else self._norms
        if not moved and versions == self._seen[1] and norms == self._norms:
            return False
        self._norms = norms if closely else self._norms_of_trained()
        self._seen = where, versions
        self.content += 1
        if moved or self.model.derives():
            self.params, self.adapters = self.model.computed_params(), self.model.adapters
            self.places += 1
        return True

    @torch.no_grad()
    def _norms_of_trained(self) -> list[float]:
        trained = [t.detach() for t in self._tensors if t.requires_grad]
        if not trained:
            return []
        # In bf16 a norm would be the same after most steps.
        dtype = reduce(torch.promote_types, (t.dtype for t in trained), torch.float32)
        found = torch._foreach_norm(trained, 2, dtype=dtype)
        norms: list[float] = torch.stack(found).tolist()
        return norms
