"""Functions of transformers that recipes stand in for, as they were when the recipes were written.

A recipe that computes by itself what a class's forward computes is right for the forward that was read, not for what
the next release of transformers makes of it. So each of those forwards is known by a fingerprint of its source, and one
of another fingerprint is left as it is.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from importlib import import_module
from importlib.metadata import version
from operator import attrgetter
from types import FunctionType
from typing import Any

from fastattn.swap.code import global_named, globals_of, is_copy

_CALLED = {"eager_attention_forward"}  # not computed by recipes: where they need it they call the installed one

unknown: dict[str, FunctionType] = {}
"""Those that were asked for and are no longer, or not yet, what a recipe was written for."""


@functools.cache
def original(file: str, path: str) -> FunctionType | None:
    """The function at `path` of a file of the installed transformers, as it was when it was first asked for: another
    library may replace it later. None where there is none, or, then kept in `unknown`, none that is known."""
    try:
        function = attrgetter(path)(import_module(f"transformers.{file}"))
    except (ImportError, AttributeError):
        return None
    if not isinstance(function, FunctionType):
        return None
    name = f"{file}:{path}"
    if fingerprint(function) in KNOWN[name]:
        return function
    unknown[name] = function
    return None


def why_unknown(function: object) -> str | None:
    """In words, where this is a copy of an original that is unknown."""
    for name, other in unknown.items():
        if is_copy(function, other):
            return f"transformers {version('transformers')} has another {name.partition(':')[2]} than fastattn knows"
    return None


def fingerprint(function: FunctionType) -> str | None:
    """Of what a function, and the functions and classes of its own file that it names, compute: the same for every
    version of Python, and whatever the comments, docstrings and annotations. None without its source, or where a
    function of another package stands around it."""
    found: dict[str, str] = {}
    package = _package(inspect.unwrap(function))
    layer: Any = function
    while hasattr(layer, "__wrapped__"):
        if _package(layer) != package:
            return None
        layer = layer.__wrapped__
    try:
        _collect(layer, found)
    except (OSError, SyntaxError, TypeError, ValueError):  # or with more than one statement, as beside a lambda
        return None
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:12]


def _package(function: Any) -> str:
    return str(function.__globals__.get("__name__", "")).partition(".")[0]


def _collect(function: FunctionType, found: dict[str, str]) -> None:
    """Raises TypeError for a name of something that has no source to ask for, a scripted function."""
    if function.__qualname__ in found:
        return
    found[function.__qualname__] = _source_shape(function)
    for name in sorted(globals_of(function.__code__) - _CALLED):
        named: Any = global_named(function, name)
        named = inspect.unwrap(named) if callable(named) else named
        if isinstance(named, (bool, int, float, str)):
            found[name] = repr(named)
        elif getattr(named, "__module__", None) == function.__module__ and callable(named):
            if isinstance(named, FunctionType):
                _collect(named, found)
            else:
                found[name] = _source_shape(named)


def _source_shape(defined: Any) -> str:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(defined))).body
    return _shape(definition)


_IGNORED = {"annotation", "returns", "type_comment", "type_params", "ctx", "kind"}


def _shape(node: Any) -> str:
    """A tree without what does not change the computation, or differs between versions of Python."""
    if isinstance(node, list):
        return f"[{','.join(map(_shape, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in _IGNORED]
    if isinstance(node, ast.AnnAssign):
        return _shape(ast.Assign([node.target], node.value or ast.Constant(None)))
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node, clean=False) is not None:
        fields = [(name, value[1:] if name == "body" else value) for name, value in fields]
    return f"{type(node).__name__}({','.join(f'{name}={_shape(value)}' for name, value in fields)})"


# Of transformers 5.20 to 5.24, those of experts from 5.0 on, oldest first; some are those of older versions as well.
# tests/swap/test_originals.py prints those of another version.
KNOWN: dict[str, tuple[str, ...]] = {
    "integrations.moe:_default_apply_gate": ("fb8ee13c6da1",),
    "integrations.moe:use_experts_implementation": (
        "5ef9037284a1",
        "1a20d3c168e6",
        "079a7eb8bfc5",
        "16fe95907ffe",
        "ba0040ab90c5",
        "c416ef0c8a08",
        "fa2c3a8db73e",
    ),
    "models.bert.modeling_bert:BertAttention.forward": (
        "cbc283f81cfa",
        "9f0c2b49f279",
    ),
    "models.bert.modeling_bert:BertLayer.feed_forward_chunk": ("4412a2dc48bd",),
    "models.bert.modeling_bert:BertLayer.forward": (
        "02774c1e52f2",
        "ae2a3b6d8594",
    ),
    "models.bert.modeling_bert:BertSelfAttention.forward": (
        "3539b34098c9",
        "da73f779974a",
    ),
    "models.bloom.modeling_bloom:BloomAttention._merge_heads": ("508986ccf8cb",),
    "models.bloom.modeling_bloom:BloomAttention._reshape": ("b9af2eba9923",),
    "models.bloom.modeling_bloom:BloomAttention.forward": ("c459d93faa6a",),
    "models.bloom.modeling_bloom:BloomGelu.forward": ("33a8c3bf1bb1",),
    "models.bloom.modeling_bloom:BloomMLP.forward": ("cea9feb2fc1e",),
    "models.clip.modeling_clip:CLIPAttention.forward": ("3c8a2d5fa660",),
    "models.clip.modeling_clip:CLIPEncoderLayer.forward": ("1300530a18f3",),
    "models.deberta_v2.modeling_deberta_v2:DisentangledSelfAttention.disentangled_attention_bias": (
        "402cc1cc591f",
        "d70a3fd8aff2",
    ),
    "models.deberta_v2.modeling_deberta_v2:DisentangledSelfAttention.forward": (
        "7e648c86f883",
        "5795cbd85cb1",
    ),
    "models.deberta_v2.modeling_deberta_v2:DisentangledSelfAttention.transpose_for_scores": ("e0d83b937b3d",),
    "models.distilbert.modeling_distilbert:FFN.ff_chunk": ("85de5fbd2260",),
    "models.distilbert.modeling_distilbert:FFN.forward": ("2c94a7e8359f",),
    "models.flava.modeling_flava:FlavaSelfAttention.forward": ("e7572b7a9db7",),
    "models.gpt_neo.modeling_gpt_neo:GPTNeoSelfAttention._attn": ("765374704c56",),
    "models.gpt_neo.modeling_gpt_neo:GPTNeoSelfAttention._merge_heads": ("a707e24d8bf7",),
    "models.gpt_neo.modeling_gpt_neo:GPTNeoSelfAttention._split_heads": ("8554fdee06d3",),
    "models.gpt_neo.modeling_gpt_neo:GPTNeoSelfAttention.forward": ("62d576bcd619",),
    "models.led.modeling_led:LEDDecoderAttention.forward": (
        "6c2b0ca5d773",
        "2c913a927239",
    ),
    "models.longformer.modeling_longformer:LongformerSelfAttention._chunk": (
        "1c011f533f3d",
        "b5ca3c49e140",
    ),
    "models.longformer.modeling_longformer:LongformerSelfAttention._compute_attn_output_with_global_indices": (
        "4812c21dc838",
    ),
    "models.longformer.modeling_longformer:LongformerSelfAttention._compute_global_attn_output_from_hidden": (
        "7a92af6c5c64",
    ),
    "models.longformer.modeling_longformer:LongformerSelfAttention._concat_with_global_key_attn_probs": (
        "5980ed56bff3",
    ),
    "models.longformer.modeling_longformer:LongformerSelfAttention._get_global_attn_indices": ("453e92e7fe34",),
    "models.longformer.modeling_longformer:LongformerSelfAttention._mask_invalid_locations": ("ad3875e7de27",),
    "models.longformer.modeling_longformer:LongformerSelfAttention._pad_and_diagonalize": ("04b75e7b940d",),
    "models.longformer.modeling_longformer:LongformerSelfAttention._pad_and_transpose_last_two_dims": ("e5b1d8740ef5",),
    "models.longformer.modeling_longformer:LongformerSelfAttention._sliding_chunks_matmul_attn_probs_value": (
        "8b7e4af8d3aa",
    ),
    "models.longformer.modeling_longformer:LongformerSelfAttention._sliding_chunks_query_key_matmul": ("874b6312377c",),
    "models.longformer.modeling_longformer:LongformerSelfAttention.forward": ("37e7fce60d5a",),
    "models.megatron_bert.modeling_megatron_bert:MegatronBertSelfAttention.forward": (
        "913ff3511391",
        "9f7d5ef1209e",
    ),
    "models.mpnet.modeling_mpnet:MPNetSelfAttention.forward": ("9a7fb8a04153",),
    "models.mpt.modeling_mpt:MptAttention.forward": (
        "f8ef6204cf40",
        "1756d528113a",
    ),
    "models.mpt.modeling_mpt:MptBlock.forward": (
        "c23ab8887b78",
        "5830c7d54a00",
    ),
    "models.mpt.modeling_mpt:MptMLP.forward": ("5bf0dc650b2a",),
    "models.mvp.modeling_mvp:MvpAttention.forward": (
        "d19e4c914c3d",
        "be6ada6cc1bb",
    ),
    "models.qwen3_moe.modeling_qwen3_moe:Qwen3MoeExperts.forward": (
        "62bdd837c1a9",
        "5e7c9e0a4fc7",
    ),
    "models.rembert.modeling_rembert:RemBertSelfAttention.forward": (
        "e82d1bdf3f0e",
        "2c052afe5f6c",
    ),
    "models.roformer.modeling_roformer:RoFormerSelfAttention.forward": (
        "84ffd9bff77b",
        "87c0c96be9e0",
    ),
    "models.siglip.modeling_siglip:SiglipAttention.forward": ("300bd16e1dd0",),
    "models.t5.modeling_t5:T5DenseActDense.forward": ("d90e12b1ed38",),
    "models.t5.modeling_t5:T5DenseGatedActDense.forward": ("1471191a6315",),
    "models.t5.modeling_t5:T5LayerNorm.forward": ("ca50d886531b",),
    "models.tapas.modeling_tapas:TapasSelfAttention.forward": (
        "047b8f933f41",
        "032b15d721ff",
    ),
    "models.trocr.modeling_trocr:TrOCRAttention.forward": (
        "1f34975bab3d",
        "51d1ce13a9e6",
    ),
    "models.vilt.modeling_vilt:ViltSelfAttention.forward": ("98be0d751af7",),
    "models.vit.modeling_vit:ViTAttention.forward": ("c63a8a7f1808",),
    "models.vit.modeling_vit:ViTLayer.forward": ("1a658bcf78d6",),
    "models.xglm.modeling_xglm:XGLMAttention.forward": (
        "f47d8cf6d4a5",
        "31d606e8f283",
    ),
}
