"""DeepSeek-V3, whole: embedding, blocks, head, the MTP chain behind them, and the loss of all.

Parameters bear the names of the released checkpoint, except that a layer's routed experts are stacked in two
tensors (``checkpoint`` splits and joins them at the edge).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checkpoint
from ..backends import Choice
from ..backends.explain import Explanation
from ..config import ModelConfig
from ..errors import ConfigError, InputError
from ..fp8.stored import keep_in_fp8
from ..layers.cache import LatentCache
from ..layers.decoder import Decoder
from ..layers.experts import MixtureOfExperts, Routing
from ..layers.rope import RotaryEmbedding
from ..layers.router import Router
from ..layers.step import Step
from ..linear import PLAIN, Linear, PlainRecipe, set_recipe
from ..recompute import Recompute
from ..shipped import checkpoint_folder
from .inputs import IGNORED, check_inputs
from .loss import LossWeights, add_losses
from .outputs import ModelOutput
from .parameters import parameter_counts

if TYPE_CHECKING:
    from ..inference.acceptance import SpeculationStatistics
    from ..inference.drafters import Drafter


class DeepSeekV3(nn.Module):
    """The model of the paper's §2, for any configuration, on any device, ``meta`` included.

    Args:
        config: sizes.
        generator: source of the initial weights; torch's global one by default.
        recompute: in training, make RMSNorm outputs and MLA's up-projections again in backward instead of
            keeping them (§3.2.3); gradients are the same to the bit.
        recipe: how products with weights are made, e.g. ``fp8.Recipe.named("tile")``; plain by default.

    Attributes:
        mtp_loss_weight: λ.
        aux_loss_alpha: α. Both start at the configuration's values; a call may be given others (``loss_weights``).
        aux_loss_over: what the balance loss asks to be balanced, each "sequence" (Eqs. 17 to 20) or the whole
            "batch" (§4.5.3).
        generation_config: fields of the checkpoint's ``generation_config.json``, where it has one; its end and
            padding tokens go before the configuration's, and it is saved with the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        generator: torch.Generator | None = None,
        recompute: bool = False,
        recipe: PlainRecipe | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.mtp_loss_weight = config.mtp_loss_weight
        self.aux_loss_alpha = config.aux_loss_alpha
        self.aux_loss_over = "sequence"
        self.generation_config: dict[str, Any] | None = None
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rope = RotaryEmbedding(config)
        self.choice = Choice()
        self.recipe = PLAIN if recipe is None else recipe
        set_recipe(self, self.recipe)
        self.initialize(generator)

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
        loss_weights: LossWeights | None = None,
    ) -> ModelOutput:
        """Score every next token; with labels, the loss too.

        Args:
            input_ids: token ids.
            labels: the same ids, with -100 where there is no target; shifted here.
            cache: holds the tokens before these and takes these in.
            lengths: valid tokens per row where rows end early (right padding); later positions are garbage,
                and no targets.
            document_ids: which document a token is of, for packed sequences: a target in another document
                is no target, at no depth. Attention does cross borders, as in training V3 (§4.1).
            return_mtp: run the MTP chain without labels too.
            loss_weights: λ and α of this call, instead of the model's own.

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
        embeddings = self.model.embed_tokens(input_ids)
        step = self.begin(input_ids, cache, lengths, embeddings, mtp=cache is None)
        with nullcontext() if step.recompute is None else step.recompute.saving():
            hidden, logits, routings = self._main(embeddings, step)
            out = ModelOutput(logits, hidden, n_routed_experts=self.config.n_routed_experts, valid=valid)
            if cache is not None:
                cache.advance(input_ids.shape[1], lengths)
            mtp_routings: list[Routing | None] = [None] * self.config.num_nextn_predict_layers
            if (labels is not None or return_mtp) and cache is None:
                out.mtp_logits, mtp_routings = self.mtp_chain(hidden, embeddings, step)
            routings = [*routings, *mtp_routings]
            out.expert_indices = [None if r is None else r.indices for r in routings]
            if labels is not None:
                ran = [r for r in routings if r is not None]
                weights = self.loss_weights if loss_weights is None else loss_weights
                add_losses(out, labels, document_ids, ran, self.config.num_experts_per_tok, weights)
                # Where a row is too short for a module it does not run; its gradient is then 0 and not absent, as
                # data parallelism asks of every parameter.
                idle = self.model.layers[self.config.num_hidden_layers + len(out.mtp_logits) :]
                out.loss = sum((p.flatten()[:0].sum() for p in idle.parameters()), out.loss)
        return out

    def _main(self, embeddings: Tensor, step: Step) -> tuple[Tensor, Tensor, list[Routing]]:
        """The main model: the head's input, its logits, and how each mixture routed."""
        engine = self.choice.few_tokens(embeddings, step)
        if engine is not None:
            logits, hidden, routings = engine.forward(embeddings, step)
        else:
            hidden, routings = self.model(embeddings, step)
            logits = self.lm_head(hidden)
        return hidden, logits, routings

    def begin(
        self,
        input_ids: Int[Tensor, "B T"],
        cache: LatentCache | None = None,
        lengths: Int[Tensor, " B"] | None = None,
        like: Tensor | None = None,
        mtp: bool = True,
    ) -> Step:
        """The facts of one call, of the main layers or (in drafting) of the MTP chain: who computes among them.

        Args:
            input_ids: this call's tokens.
            cache: holds the tokens before these.
            lengths: valid tokens per row.
            like: of the device and dtype of the hidden states; by default as the embedding is.
            mtp: whether MTP modules run in this call.
        """
        batch, n_new = input_ids.shape
        like = self.model.embed_tokens.weight if like is None else like
        self.recipe.refuse(like.device)
        compute = self.choice.backend(self, like, mtp)
        if cache is None:
            recompute = Recompute() if self.recompute and torch.is_grad_enabled() else None
            return Step(self.rope.table(n_new, like), recompute=recompute, backend=compute)
        before, _ = cache.plan(batch, n_new, lengths, compute.page, compute.latent_codec)
        n_total, totals = len(cache) + n_new, None
        if not cache.ragged:
            if compute.page > 1:
                totals = torch.full((batch,), n_total, dtype=torch.int32, device=input_ids.device)
            rotations = self.rope.table(n_total, like)[-n_new:]
            return Step(rotations, cache=cache, lengths=lengths, totals=totals, backend=compute)
        # Not blocking: the host must not wait for what the GPU has under way.
        before = before.to(input_ids.device, non_blocking=True)
        if compute.page > 1:
            totals = (before + n_new).int()
        positions = before[:, None] + torch.arange(n_new, device=input_ids.device)
        mask = torch.arange(n_total, device=input_ids.device) <= positions[..., None]
        rotations = self.rope(positions, n_total, like)
        return Step(rotations, mask[:, None], cache, lengths, totals=totals, backend=compute)

    def mtp_chain(
        self, hidden: Float[Tensor, "B T D"], embeddings: Float[Tensor, "B T D"], step: Step
    ) -> tuple[list[Float[Tensor, "B Tk vocab"]], list[Routing | None]]:
        """Run module after module, each one token further ahead (Eqs. 21 to 23).

        Args:
            hidden: the main head's input.
            embeddings: of the tokens.
            step: the facts of the call.

        Returns:
            Each depth's logits, and how each mixture routed, ``None`` where nothing lies that far ahead.
        """
        logits, routings = [], []
        for module in self.model.layers[self.config.num_hidden_layers :]:
            if hidden.shape[1] < 2:  # nothing lies that far ahead
                routings.append(None)
                continue
            hidden = hidden[:, :-1]
            embeddings = embeddings[:, 1:]
            ahead = replace(step, rotations=step.rotations[: hidden.shape[1]])
            hidden, routing = module.advance(hidden, embeddings, ahead)
            logits.append(self.lm_head(hidden))
            routings.append(routing)
        return logits, routings

    # ---- looking in ----------------------------------------------------------------------------------

    @property
    def loss_weights(self) -> LossWeights:
        """λ and α as the attributes have them."""
        return LossWeights(self.mtp_loss_weight, self.aux_loss_alpha, self.aux_loss_over)

    def explain(self) -> Explanation:
        """Which backend computes each operation here, and why; a table in a notebook, text elsewhere.

        It is read off the decisions that the next call would be computed by: hang a hook on a module, patch or replace
        it, and its line says that the module itself is called.
        """
        return Explanation.of(self, self.choice)

    def routers(self) -> list[Router]:
        """The gates, in the order of ``config.moe_layers``."""
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MixtureOfExperts)]

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part, see ``model.parameters``; works on the meta device."""
        return parameter_counts(self, self.config)

    # ---- use -----------------------------------------------------------------------------------------

    def generate(
        self,
        input_ids: Int[Tensor, "*prompts"],
        max_new_tokens: int = 64,
        temperature: float | Sequence[float] = 0.0,
        top_p: float = 1.0,
        speculative: bool = False,
        *,
        top_k: int | None = None,
        stop_tokens: Collection[int] | None = None,
        lengths: Int[Tensor, "*rows"] | None = None,
        generator: torch.Generator | None = None,
        draft_tokens: int | str | None = None,
        drafter: Drafter | DeepSeekV3 | str | None = None,
        statistics: SpeculationStatistics | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Int[Tensor, "B T_out"]:
        """Continue each row until a stop token or ``max_new_tokens``; the whole story is in ``inference.generate``.

        Args:
            input_ids: [B, T], prompts, right-padded where ``lengths`` [B] says that rows end early.
            max_new_tokens: at most so many are added to a row.
            temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled. One number, or
                one a row.
            top_p: sample among the likeliest tokens that together hold this probability.
            speculative: a drafter guesses, the model verifies: the same text in fewer passes.
            top_k: sample among so many likeliest tokens; by default all.
            stop_tokens: a row ends with the first of these; by default the checkpoint's end tokens.
            generator: source of the sampling; or ``seeds``, one a row.
            draft_tokens: drafts a pass, one per MTP module by default, "auto" as many as pay. statistics: counts what
                is accepted.
            drafter: "mtp", the default, "lookup" or a smaller model.

        Returns:
            Each row's prompt and continuation, filled up with ``pad_token_id`` to the longest row.

        Raises:
            InputError: a setting is out of range. ContextLengthError: the text would become too long.
        """
        from ..inference.generate import generate

        return generate(
            self, input_ids, max_new_tokens, temperature, top_p, speculative, top_k=top_k, stop_tokens=stop_tokens,
            lengths=lengths, generator=generator, draft_tokens=draft_tokens, drafter=drafter, statistics=statistics,
            seeds=seeds,
        )  # fmt: skip

    def save_pretrained(self, folder: str | Path, **settings: object) -> None:
        """Write ``config.json`` and safetensors with Hugging Face's names; see ``checkpoint.save``."""
        checkpoint.save(self, folder, **settings)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | str | None = None, device: str = "cpu"
    ) -> DeepSeekV3:
        """Read a folder in Hugging Face's form, FP8 files too, or a shipped checkpoint by its name ("tiny-v3").

        See ``checkpoint.load`` and ``shipped.checkpoint_folder``.

        Args:
            folder: of the checkpoint, or its name.
            dtype: of the parameters, by default that of the files; "fp8" keeps the matrices that released files hold
                in FP8 as they are and runs from them, for inference (``fp8.stored``), all else as the embedding.
            device: where to.

        Raises:
            CheckpointError: the files cannot be used. ConfigError: ``dtype`` is another word than "fp8".
        """
        folder = checkpoint_folder(folder)
        with torch.device("meta"):
            model = cls(checkpoint.read_config(folder))
            if isinstance(dtype, str):
                if dtype != "fp8":
                    raise ConfigError(f"dtype is {dtype!r}, expected a torch.dtype, None or 'fp8'")
                keep_in_fp8(model)
                dtype = None
        checkpoint.load(model, folder, dtype=dtype, device=device)
        return model
