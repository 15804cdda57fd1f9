"""Self-distillation of the MTP chain: its modules learn to guess what the main model would say.

Pre-training asks each module for the text's own token. Verification asks another thing: a draft stands where it is what
the *model* says, right or wrong. So once the main model is done it is frozen, and the modules alone go on, towards its
whole distribution: at depth k and position i KL(p_{i+k} ‖ q_i), where p is the main model's. That never changes the
model's text, only how many drafts stand in it. (The draft model's side of "knowledge distillation"; DistillSpec, Zhou
et al., 2023, measures the divergences to choose from. V3's report does not do it.)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ...errors import ConfigError
from ...model.loss import LossWeights
from ..text.data import Batch
from .balance import update_bias
from .gradients import Gradients, finish
from .optimizer import AdamW
from .trainer import Trainer


def distillation_loss(
    logits: Float[Tensor, "B T vocab"], drafts: Float[Tensor, "B Tk vocab"], counted: Bool[Tensor, "B Tk"]
) -> Float[Tensor, ""]:
    """Mean KL(p ‖ q) of one depth's predictions from the main model's for the same tokens.

    Args:
        logits: the main model's; no gradient flows into them.
        drafts: of depth k; position i predicts what the main model does at i + k, k = T − Tk.
        counted: which positions count.

    Returns:
        Nats a position; 0 where none counts.
    """
    p = logits[:, logits.shape[1] - drafts.shape[1] :].detach().float().log_softmax(-1)
    divergence = (p.exp() * (p - drafts.float().log_softmax(-1))).sum(-1)
    return divergence.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def within_document(batch: Batch, depth: int) -> Bool[Tensor, "B Tk"]:
    """Where a depth's draft and the tokens that it is made from belong to the same document.

    Args:
        batch: with ``document_ids`` and ``labels``. depth: k, from 1.
    """
    same = batch.document_ids[:, depth:] == batch.document_ids[:, :-depth]
    return same & (batch.labels[:, depth:] >= 0)


class DraftTrainer(Trainer):
    """Trains the MTP modules of a model on its own predictions; all other weights stay as they are, bit for bit.

    The arguments are those of ``Trainer``. A step's ``losses`` are the divergences, ``mtp_k`` of depth k. The biases of
    the modules' own routers go on balancing, the main model's rest.

    Raises:
        ConfigError: the model has no MTP module, or the settings ask for averaged weights or validation, which would
            be of the frozen model.
    """

    def _prepare(self) -> None:
        if self.model.config.num_nextn_predict_layers == 0:
            raise ConfigError("num_nextn_predict_layers: 0, expected MTP modules, which are what is trained")
        for name in ("ema_decay", "validation_batches"):
            if getattr(self.config, name):
                raise ConfigError(f"{name}: {getattr(self.config, name)}, expected 0: the main model does not change")
        trained = {id(p) for module in self._modules for p in module.parameters()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    @property
    def _modules(self) -> list[torch.nn.Module]:
        return list(self.model.model.layers[self.model.config.num_hidden_layers :])

    def _make_optimizer(self) -> tuple[AdamW, frozenset[str]]:
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        return AdamW.of(self.config, trained), frozenset()

    def _gradients(self, batch: Batch, weights: LossWeights) -> Gradients:
        out = self.model(batch.input_ids.to(self.device), return_mtp=True)
        losses = {
            f"mtp_{k}": distillation_loss(out.logits, logits, within_document(batch, k).to(self.device))
            for k, logits in enumerate(out.mtp_logits, start=1)
        }
        out.loss = sum(losses.values()) / len(losses)
        return finish(self.model, out, losses, batch, self.config.gradient_clip, self.stream.domain_names)

    def _update_biases(self, load: Int64[Tensor, "layers E"], speed: float) -> None:
        routers = self.model.routers()
        depth = self.model.config.num_nextn_predict_layers
        for router, of_router in list(zip(routers, load, strict=True))[-depth:]:
            update_bias(router, of_router, speed, centre=self.config.centre_bias)

    def _describe(self, source: dict[str, Any]) -> dict[str, Any]:
        return super()._describe(source | {"objective": "drafts"})
