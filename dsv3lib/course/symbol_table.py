"""The table of symbols that a lesson opens with: the paper's letter, the code's name, the shape, V3, tiny.

Both columns of numbers are computed from the presets, so none can be wrong in one lesson alone.
"""

from __future__ import annotations

import ast
import html
import operator
import re
from collections.abc import Mapping
from types import MappingProxyType

from dsv3lib.config import ModelConfig
from dsv3lib.course import card
from dsv3lib.errors import CourseError

SIZES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "V": ("vocab_size", "tokens in the vocabulary"),
        "d": ("hidden_size", "width of the stream from layer to layer"),
        "L": ("num_hidden_layers", "layers"),
        "n_h": ("num_attention_heads", "attention heads"),
        "d_h": ("qk_nope_head_dim", "dimensions of a head's content"),
        "d_h^R": ("qk_rope_head_dim", "dimensions that carry the position"),
        "d_v": ("v_head_dim", "dimensions of a head's value"),
        "d_c": ("kv_lora_rank", "width of the cached latent"),
        "d_c'": ("q_lora_rank", "width of the query's latent"),
        "N_r": ("n_routed_experts", "experts that a layer can choose from"),
        "N_s": ("n_shared_experts", "experts that every token passes through"),
        "K_r": ("num_experts_per_tok", "experts that a token is sent to"),
        "n_g": ("n_group", "groups (nodes) that the experts are divided into"),
        "M": ("topk_group", "groups that a token may go to"),
        "s_r": ("routed_scaling_factor", "what the gates are multiplied by"),
        "d_f": ("intermediate_size", "inner width of a dense feed-forward network"),
        "d_e": ("moe_intermediate_size", "inner width of an expert"),
        "D": ("num_nextn_predict_layers", "further tokens predicted"),
        "T_max": ("max_position_embeddings", "longest context, in tokens"),
    }
)
"""Symbol → (field of ModelConfig, meaning): the sizes that any lesson may name. `d_v`, `n_g`, `s_r`, `d_f`, `d_e`
are this course's letters; the paper names those sizes in words."""

PRESETS = (("V3", "v3-671b"), ("tiny", "tiny"))
_HEAD = ["paper", "code", "shape", *(title for title, _ in PRESETS), "what it is"]
_SHAPE = _HEAD.index("shape")
_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def symbols(*rows: str | tuple[str, ...]) -> None:
    """Display the symbols that a lesson uses, as a table.

    Args:
        rows: a letter of :data:`SIZES`, or (paper, code, shape, meaning) for anything else, with the shape in
            those letters, as in ``("c_t^{KV}", "latent", "[d_c]", "what is cached of a token")``; a sum or a
            product of them is worked out: ``"[n_h, d_h + d_h^R]"``, ``"[n_h*d_v]"``.

    Raises:
        CourseError: a letter is unknown, or a row has not four parts.
    """
    configs = [ModelConfig.preset(name) for _, name in PRESETS]
    lines = [_HEAD, *(_row(row, configs) for row in rows)]
    if not any(line[_SHAPE] for line in lines[1:]):  # sizes alone have no shape
        lines = [line[:_SHAPE] + line[_SHAPE + 1 :] for line in lines]
    marks = {"paper": typeset, "shape": typeset, "code": card.inline}
    marked = [
        [marks.get(name, card.inline)(cell) for name, cell in zip(lines[0], line, strict=True)]
        for line in lines[1:]
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    plain = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    card.show(card.table_of_html(lines[0], marked), "\n".join(plain))


def shape_of(shape: str, config: ModelConfig) -> str:
    """Return a shape with a configuration's numbers in it; letters that are no size (B, T) stay.

    Args:
        shape: as in ``"[T, n_h, d_h + d_h^R]"``. config: where the numbers come from.
    """
    parts = shape.strip("[]").split(",")
    return (
        f"[{', '.join(_dimension(part, config) for part in parts)}]"
        if shape.startswith("[")
        else _dimension(shape, config)
    )


def typeset(symbol: str) -> str:
    """Return a symbol as HTML: ``d_h^R`` with its index and its power; no script is needed to show it."""
    text = html.escape(symbol)
    for mark, tag in (("_", "sub"), ("^", "sup")):
        text = re.sub(re.escape(mark) + r"\{([^}]*)\}", rf"<{tag}>\1</{tag}>", text)
        text = re.sub(re.escape(mark) + r"(\w+?)(?=[_^\W]|$)", rf"<{tag}>\1</{tag}>", text)
    return f"<i>{text}</i>"


def _row(row: str | tuple[str, ...], configs: list[ModelConfig]) -> list[str]:
    if isinstance(row, str):
        if row not in SIZES:
            raise CourseError(f"there is no symbol {row!r}; there are {', '.join(SIZES)}")
        name, meaning = SIZES[row]
        return [row, f"`{name}`", "", *(f"{getattr(config, name):,}" for config in configs), meaning]
    if len(row) != 4:
        raise CourseError(
            f"a row of symbols has {len(row)} parts, expected 4: paper, code, shape, meaning; got {row!r}"
        )
    paper, code, shape, meaning = row
    known = [shape_of(shape, config) for config in configs] if shape else ["" for _ in configs]
    return [paper, f"`{code}`" if code else "", shape, *known, meaning]


def _dimension(text: str, config: ModelConfig) -> str:
    letters = sorted(SIZES, key=len, reverse=True)
    pattern = "|".join(rf"(?<![\w^']){re.escape(letter)}(?![\w^'])" for letter in letters)
    filled = re.sub(pattern, lambda match: str(getattr(config, SIZES[match.group()][0])), text.strip())
    value = _computed(filled)
    return f"{value:,}" if value is not None else filled


def _computed(text: str) -> int | None:
    """The value of a sum or product of whole numbers, or None where letters are left."""
    try:
        return _value(ast.parse(text.replace("·", "*").replace("/", "//"), mode="eval").body)
    except (SyntaxError, ValueError):
        return None


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not whole numbers alone")
