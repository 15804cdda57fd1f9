"""A model, or an MTP module, over few tokens of one row on a CPU, in as little started work as it takes.

When one row goes on by a token, or by a handful that speculation wants verified, each matrix is read once and the
activations are tiny: what costs is not arithmetic but *starting* operations, some 200 of them in a layer of the plain
form, 1 to 10 µs each, and reading the weights. Here tokens are NumPy arrays and the weights lie where the model has
them (``token_weights``): NumPy starts an operation in a third of a microsecond. A model in 16 bits is read from copies
in FP32, and its hidden states are rounded where they leave; the cache keeps 16 bits, as the plain form has it. The
plain layers are the definition; a test holds both equal. No gradient is kept, and no module is called: ``choice`` takes
this road only where every module is as it was built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..config import ModelConfig
from ..layers.cache import LatentCache
from ..layers.decoder import Decoder
from ..layers.experts import Routing
from ..layers.mtp import MTPModule
from ..layers.step import Step
from ..linear import Linear
from .few_blocks import FewBlocks
from .token_weights import ChainWeights, ModelWeights, product
from .weight_copies import COPIED, Array, WeightReader, as_array


class FewTokens(FewBlocks):
    """The main model.

    Args:
        config: sizes.
        decoder: the model's, as it was built.
        head: the model's.
        reader: gives the weights as arrays.
    """

    def __init__(self, config: ModelConfig, decoder: Decoder, head: Linear, reader: WeightReader) -> None:
        super().__init__(config, reader)
        self.weights = ModelWeights.of(config, decoder, head, reader)

    def forward(
        self, x: Float[Tensor, "1 T D"], step: Step
    ) -> tuple[Float[Tensor, "1 T vocab"], Float[Tensor, "1 T D"], list[Routing]]:
        """All blocks, the last norm and the head.

        Args:
            x: the tokens' embeddings.
            step: the call's cache and rotations.

        Returns:
            Logits, the head's input, and how each mixture routed.
        """
        weights, rotations, routings = self.weights, step.rotations.numpy(), []
        store = partial(step.cache.append_rows, dtype=x.dtype)
        # exp(-z) may overflow to infinity, where the sigmoid is rightly 0; and NaN goes its way as in torch.
        with np.errstate(all="ignore"):
            rows = self.reader.rows(x)
            for w in weights.blocks:
                rows, routing = self.block(w, rows, store, rotations)
                if routing is not None:
                    routings.append(routing)
            hidden = self.normalize(rows, weights.norm)
            logits = product(weights.head, hidden)
        return _tensor(logits, x), _tensor(hidden, x), routings

    def head(self, hidden: Float[Tensor, "1 T D"]) -> Float[Tensor, "1 T vocab"]:
        """The output head alone, for drafts of the MTP chain: torch's product of one row takes several times as long.

        Args:
            hidden: normalised.
        """
        return _tensor(product(self.weights.head, self.reader.rows(hidden)), hidden)


class FewLink(FewBlocks):
    """One MTP module, a link of the chain (Eqs. 21 and 22).

    Args:
        config: sizes.
        module: as it was built.
        reader: as for ``FewTokens``.
    """

    def __init__(self, config: ModelConfig, module: MTPModule, reader: WeightReader) -> None:
        super().__init__(config, reader)
        self.weights = ChainWeights.of(config, module, reader)

    def advance(
        self, hidden: Float[Tensor, "1 T D"], embedding: Float[Tensor, "1 T D"], step: Step
    ) -> tuple[Float[Tensor, "1 T D"], Routing | None]:
        """h^k and the routing, as ``MTPModule.advance`` gives them; the arguments are the same."""
        store = partial(step.cache.append_rows, dtype=hidden.dtype)
        of_tokens = self.reader.rows(hidden), self.reader.rows(embedding)
        rows, routing = self.rows(*of_tokens, store, step.rotations.numpy())
        return _tensor(rows, hidden), routing

    def rows(
        self, hidden: Array, embedding: Array, store: Callable[[int, Array], Array], rotations: Array
    ) -> tuple[Array, Routing | None]:
        """The same over arrays [T, D]; ``store`` and ``rotations`` as for ``FewBlocks.block``."""
        w = self.weights
        with np.errstate(all="ignore"):
            e, h = self.normalize(embedding, w.enorm), self.normalize(hidden, w.hnorm)
            x = product(w.eh, np.concatenate([e, h], 1))
            x, routing = self.block(w.block, x, store, rotations)
            return self.normalize(x, w.norm), routing


class FewChain:
    """Links of the MTP chain with embedding and head, for drafting: tokens in, logits out, and arrays between.

    A round of drafts is two handfuls of calls on single rows. Between tensors and arrays each would go back and forth,
    which takes a fifth of the drafts' time.

    Args:
        main: the main model's engine, whose head it is.
        links: of the modules that draft.
        embedding: the main model's.
    """

    def __init__(self, main: FewTokens, links: Sequence[FewLink], embedding: Float[Tensor, "vocab D"]) -> None:
        self._head, self._links, self._embedding = main.weights.head, links, embedding.detach()
        self._values = None if embedding.dtype in COPIED else self._embedding.numpy()

    def advance(
        self, k: int, hidden: Array, tokens: Array, cache: LatentCache, rotations: Array
    ) -> tuple[Array, Array]:
        """Link k over tokens, from 0.

        Args:
            hidden: h^{k−1} of their positions, [T, D]. tokens: the ones that it reads, [T]. cache: the chain's.
            rotations: of the positions, complex [T, R/2].

        Returns:
            h^k [T, D], and the last position's logits [vocab].
        """
        store = partial(cache.append_rows, dtype=self._embedding.dtype)
        if self._values is not None:
            embedded = self._values[tokens]
        else:  # of 16 bits these rows alone are widened
            embedded = as_array(self._embedding[torch.from_numpy(tokens)])
        rows, _ = self._links[k].rows(hidden, embedded, store, rotations)
        return rows, product(self._head, rows[-1:])[0]


def _tensor(rows: Array, like: Tensor) -> Float[Tensor, "1 T width"]:
    return torch.from_numpy(rows)[None].to(like.dtype)
