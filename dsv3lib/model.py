"""DeepSeek-V3, whole: embedding, blocks, head, the MTP chain behind them, and the loss of all.

Parameters bear the names of the released checkpoint, except that a layer's routed experts are stacked in two
tensors (``checkpoint`` splits and joins them at the edge).
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import checkpoint
from .config import ModelConfig
from .errors import InputError
from .inputs import IGNORED, check_inputs
from .kernels.toolchain.targets import for_layers
from .layers.attention import Step
from .layers.block import Block
from .layers.cache import LatentCache
from .layers.experts import MixtureOfExperts, Routing
from .layers.mtp import MTPModule
from .layers.norm import RMSNorm
from .layers.one_token import OneToken, applies
from .layers.recompute import Recipes, run
from .layers.rope import RotaryEmbedding
from .layers.router import Router, balance_loss
from .outputs import ModelOutput

if TYPE_CHECKING:
    from .inference.acceptance import SpeculationStatistics

PARTS = (
    "embedding", "head", "attention", "dense", "shared_experts", "routed_experts", "router", "norms", "mtp",
)  # fmt: skip


class Decoder(nn.Module):
    """Everything under the checkpoint's prefix ``model.``: embedding, blocks with the MTP modules, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        main = [Block(config, i) for i in range(config.num_hidden_layers)]
        depths = range(config.num_nextn_predict_layers)
        self.layers = nn.ModuleList(main + [MTPModule(config, config.num_hidden_layers + k) for k in depths])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DeepSeekV3(nn.Module):
    """The model of the paper's §2, for any configuration, on any device, ``meta`` included.

    Args:
        config: sizes. generator: source of the initial weights; torch's global one by default.
        recompute: in training, make RMSNorm outputs and MLA's up-projections again in backward instead of
            keeping them (§3.2.3); gradients are the same to the bit.

    Attributes:
        mtp_loss_weight: λ. aux_loss_alpha: α. Both start at the configuration's values and may be changed
            while training.
        aux_loss_over: what the balance loss asks to be balanced, each "sequence" (Eqs. 17 to 20) or the whole
            "batch" (§4.5.3).
        generation_config: fields of the checkpoint's ``generation_config.json``, where it has one; its end and
            padding tokens go before the configuration's, and it is saved with the model.
    """

    def __init__(
        self, config: ModelConfig, generator: torch.Generator | None = None, recompute: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.mtp_loss_weight = config.mtp_loss_weight
        self.aux_loss_alpha = config.aux_loss_alpha
        self.aux_loss_over = "sequence"
        self.generation_config: dict[str, Any] | None = None
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rope = RotaryEmbedding(config)
        self.one_token = OneToken(config)
        self.initialize(generator)

    def _apply(self, fn, recurse=True):
        self.one_token.forget()  # weights move or are cast
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Matrices from N(0, ``initializer_range``²), norms at one, biases at zero (§4.2 has 0.006)."""
        for name, parameter in self.named_parameters():
            if parameter.device.type == "meta":
                continue
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)

    # ---- forward -------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"] | None = None,
        cache: LatentCache | None = None,
        lengths: Int[Tensor, " B"] | None = None,
        document_ids: Int[Tensor, "B T"] | None = None,
        return_mtp: bool = False,
    ) -> ModelOutput:
        """Score every next token; with labels, the loss too.

        Args:
            input_ids: token ids. labels: the same ids, with -100 where there is no target; shifted here.
            cache: holds the tokens before these and takes these in.
            lengths: valid tokens per row where rows end early (right padding); later positions are garbage,
                and no targets.
            document_ids: which document a token is of, for packed sequences: a target in another document
                is no target, at no depth. Attention does cross borders, as in training V3 (§4.1).
            return_mtp: run the MTP chain without labels too.

        Raises:
            InputError: ids, labels or lengths of the wrong shape, dtype or range.
            ContextLengthError: the sequence is longer than ``max_position_embeddings``.
            CacheError: the cache belongs to another batch or model.
        """
        check_inputs(self.config, input_ids, labels, cache, lengths, document_ids)
        if return_mtp and cache is not None:
            raise InputError(
                "return_mtp: the modules look ahead of each position and cannot go on from a cache; leave the cache "
                "out, or let generate(speculative=True) draft with them"
            )
        valid = None
        if lengths is not None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            valid = positions < lengths.to(input_ids.device, non_blocking=True)[:, None]
        if labels is not None and valid is not None:
            labels = labels.masked_fill(~valid, IGNORED)
        step = self.begin(input_ids, cache, lengths)
        with nullcontext() if step.recipes is None else step.recipes.saving():
            return self._forward(input_ids, labels, document_ids, return_mtp, step, valid)

    def _forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        document_ids: Tensor | None,
        return_mtp: bool,
        step: Step,
        valid: Tensor | None,
    ) -> ModelOutput:
        embeddings = self.model.embed_tokens(input_ids)
        if applies(embeddings, step, self.config):
            logits, hidden, routings = self.one_token.forward(self.model, self.lm_head, embeddings, step)
        else:
            x, routings = embeddings, []
            for block in islice(self.model.layers, self.config.num_hidden_layers):
                x, routing = block(x, step)
                routings += [] if routing is None else [routing]
            hidden = run(step.recipes, self.model.norm, x)
            logits = self.lm_head(hidden)
        out = ModelOutput(logits, hidden, n_routed_experts=self.config.n_routed_experts, valid=valid)
        if step.cache is not None:
            step.cache.advance(input_ids.shape[1], step.lengths)
        mtp_routings: list[Routing | None] = [None] * self.config.num_nextn_predict_layers
        if (labels is not None or return_mtp) and step.cache is None:
            out.mtp_logits, mtp_routings = self._mtp_chain(hidden, embeddings, step)
        routings += mtp_routings
        out.expert_indices = [None if r is None else r.indices for r in routings]
        if labels is not None:
            self._add_losses(out, labels, document_ids, [r for r in routings if r is not None])
        return out

    def begin(self, input_ids: Tensor, cache: LatentCache | None, lengths: Tensor | None) -> Step:
        """Positions, turns and mask of one call, of the main layers or (in drafting) of the MTP chain."""
        batch, n_new = input_ids.shape
        like = self.model.norm.weight
        recipes = Recipes() if self.recompute and torch.is_grad_enabled() and cache is None else None
        if cache is None:
            return Step(self.rope.table(n_new, like), recipes=recipes)
        before, _ = cache.plan(batch, n_new, lengths)
        n_total = len(cache) + n_new
        held = None
        if not cache.ragged:
            if for_layers(like):
                held = torch.full((batch,), n_total, dtype=torch.int32, device=input_ids.device)
            return Step(self.rope.table(n_total, like)[-n_new:], cache=cache, lengths=lengths, held=held)
        # Not blocking: the host must not wait for what the GPU has under way.
        before = before.to(input_ids.device, non_blocking=True)
        if for_layers(like):
            held = (before + n_new).int()
        positions = before[:, None] + torch.arange(n_new, device=input_ids.device)
        mask = torch.arange(n_total, device=input_ids.device) <= positions[..., None]
        return Step(self.rope(positions, n_total, like), mask[:, None], cache, lengths, held=held)

    def _mtp_chain(
        self, hidden: Tensor, embeddings: Tensor, step: Step
    ) -> tuple[list[Tensor], list[Routing | None]]:
        """Run module after module, each one token further ahead (Eqs. 21 to 23)."""
        logits, routings = [], []
        for module in self.model.layers[self.config.num_hidden_layers :]:
            if hidden.shape[1] < 2:  # nothing lies that far ahead
                routings.append(None)
                continue
            hidden = hidden[:, :-1]
            embeddings = embeddings[:, 1:]
            ahead = Step(step.turns[: hidden.shape[1]], recipes=step.recipes)
            hidden, routing = module.advance(hidden, embeddings, ahead)
            logits.append(self.lm_head(hidden))
            routings.append(routing)
        return logits, routings

    def _add_losses(
        self, out: ModelOutput, labels: Tensor, document_ids: Tensor | None, routings: list[Routing]
    ) -> None:
        """Cross-entropy of the head and of each depth, and the balance loss (Eqs. 17, 24 and 25)."""
        out.losses["main"] = next_token_loss(out.logits, labels, 1, document_ids)
        for k, logits in enumerate(out.mtp_logits, start=1):
            out.losses[f"mtp_{k}"] = next_token_loss(logits, labels, k + 1, document_ids)
        out.loss = out.losses["main"]
        if out.mtp_logits:
            depths = sum(out.losses[f"mtp_{k}"] for k in range(1, len(out.mtp_logits) + 1))
            out.loss = out.loss + self.mtp_loss_weight / len(out.mtp_logits) * depths
        if self.aux_loss_alpha and routings:
            out.losses["balance"] = sum(
                balance_loss(
                    r.scores,
                    self.config.num_experts_per_tok,
                    self.aux_loss_alpha,
                    self.aux_loss_over,
                    out.valid_at(r.scores.shape[1]),
                )
                for r in routings
            )
            out.loss = out.loss + out.losses["balance"]

    # ---- looking in ----------------------------------------------------------------------------------

    def routers(self) -> list[Router]:
        """The gates, in the order of ``config.moe_layers``."""
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MixtureOfExperts)]

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; works on the meta device.

        Returns:
            "embedding", "head", "attention", "dense", "shared_experts", "routed_experts", "router" (with its
            biases), "norms", "mtp" (all that the MTP modules own), "main" (all but "mtp"), "active" (main
            parameters that one token meets: of the routed experts K_r, of the embedding nothing).
        """
        counts = dict.fromkeys(PARTS, 0)
        tensors = dict(self.named_parameters())
        tensors |= {n: b for n, b in self.named_buffers() if n.endswith("e_score_correction_bias")}
        for name, tensor in tensors.items():
            counts[_part_of(name, self.config.num_hidden_layers)] += tensor.numel()
        counts["main"] = sum(counts.values()) - counts["mtp"]
        idle = 1 - self.config.num_experts_per_tok / self.config.n_routed_experts
        counts["active"] = counts["main"] - counts["embedding"] - round(counts["routed_experts"] * idle)
        return counts

    # ---- use -----------------------------------------------------------------------------------------

    def generate(
        self,
        input_ids: Int[Tensor, "*prompts"],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        speculative: bool = False,
        *,
        stop_tokens: Collection[int] | None = None,
        lengths: Int[Tensor, "*rows"] | None = None,
        generator: torch.Generator | None = None,
        draft_tokens: int | None = None,
        statistics: SpeculationStatistics | None = None,
    ) -> Int[Tensor, "B T_out"]:
        """Continue each row until a stop token or ``max_new_tokens``; the whole story is in ``inference.generate``.

        Args:
            input_ids: [B, T], prompts, right-padded where ``lengths`` [B] says that rows end early.
            max_new_tokens: at most so many are added to a row.
            temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled.
            top_p: sample among the likeliest tokens that together hold this probability.
            speculative: the MTP modules draft, the model verifies: the same text in fewer passes.
            stop_tokens: a row ends with the first of these; by default the checkpoint's end tokens.
            generator: source of the sampling.
            draft_tokens: drafts a pass, one per MTP module by default. statistics: counts what is accepted.

        Returns:
            Each row's prompt and continuation, filled up with ``pad_token_id`` to the longest row.

        Raises:
            InputError: a setting is out of range. ContextLengthError: the text would become too long.
        """
        from .inference.generate import generate

        return generate(
            self, input_ids, max_new_tokens, temperature, top_p, speculative, stop_tokens=stop_tokens,
            lengths=lengths, generator=generator, draft_tokens=draft_tokens, statistics=statistics,
        )  # fmt: skip

    def save_pretrained(self, folder: str | Path, **settings: object) -> None:
        """Write ``config.json`` and safetensors with Hugging Face's names; see ``checkpoint.save``."""
        checkpoint.save(self, folder, **settings)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> DeepSeekV3:
        """Read a folder in Hugging Face's form, FP8 files too; see ``checkpoint.load``."""
        with torch.device("meta"):
            model = cls(checkpoint.read_config(folder))
        checkpoint.load(model, folder, dtype=dtype, device=device)
        return model


def next_token_loss(
    logits: Float[Tensor, "B Tk vocab"],
    labels: Int[Tensor, "B T"],
    ahead: int,
    document_ids: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of position i's logits against the label ``ahead`` places on (Eq. 24).

    Args:
        logits: at least T − ahead positions are used. ahead: 1 for the main head, k + 1 at MTP depth k.
        document_ids: a label in another document than its position is ignored.

    Returns:
        Nats per target, at least FP32; 0 where there is no target at all.
    """
    n = max(labels.shape[1] - ahead, 0)
    target = labels[:, ahead:].long()
    if document_ids is not None:
        target = target.masked_fill(document_ids[:, ahead:] != document_ids[:, :n], IGNORED)
    # To give the last positions no target costs less than to cut their logits off, which copies the rest.
    target = F.pad(target, (0, logits.shape[1] - n), value=IGNORED)
    logits = logits.flatten(0, 1)
    if logits.element_size() < 4:
        logits = logits.float()
    total = F.cross_entropy(logits, target.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (target != IGNORED).sum().clamp(min=1)


def _part_of(name: str, n_main: int) -> str:
    """To which part of the model a parameter belongs."""
    pieces = name.split(".")
    if pieces[1] == "layers" and int(pieces[2]) >= n_main:
        return "mtp"
    if name.endswith("norm.weight"):
        return "norms"
    for piece, part in (
        ("embed_tokens", "embedding"), ("lm_head", "head"), ("self_attn", "attention"), ("gate", "router"),
        ("shared_experts", "shared_experts"), ("experts", "routed_experts"),
    ):  # fmt: skip
        if piece in pieces:
            return part
    return "dense"
