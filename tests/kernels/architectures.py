"""Every causal LM of transformers, tiny and random: served by patch_model, refused, or not built.

    python -m tests.kernels.architectures > docs/architectures.md     # minutes
    python -m tests.kernels.architectures mixtral gpt_oss             # these alone

A configuration is the architecture's own default with its sizes made small, and every scale and
cap of the logits set to a number that shows. A served one gives the log-probabilities of its own
logits.
"""

import argparse
import copy
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from agro_kernels import next_tokens, patch_model

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim"), 32),
    **dict.fromkeys(("embedding_size", "dim_model", "word_embed_proj_dim", "output_dim"), 32),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2
    ),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("n_inner", "d_ff", "dim_ff", "dff", "moe_intermediate_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "ffn_hidden_size", "d_inner"), 48),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 71),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "num_shared_experts"), 1),
    "num_experts_per_token": 2,
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads", "mamba_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "mamba_d_ssm": 64,
    "encoder_hash_byte_group_vocab": 71,
    "hidden_size_global": 32,
    "expert_ffn_hidden_size": 48,
    "zero_expert_num": 2,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "rotary_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "qk_rope_head_dim"), 8),
    "qk_head_dim": 16,
    "lru_width": 32,
}
# Numbers that show on logits of random weights.
TOLD = {
    **dict.fromkeys(("logit_scale", "logits_scaling", "lm_head_multiplier"), 0.25),
    "logits_mup_width_multiplier": 4.0,
    "output_multiplier": 0.25,
    "dim_model_base": 8,
    "final_logit_softcapping": 2.0,
    "logits_soft_cap": 2.0,
    "output_logit_soft_cap": 2.0,
}
LARGEST = 20_000_000  # parameters of what is still called tiny
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


class Row(NamedTuple):
    """One line of the table."""

    family: str
    model: str
    outcome: str
    """served, refused or not built"""
    why: str


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What one family needs besides.
OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def small(family: str, default: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration of the class of `default` with small sizes, and those inside it likewise."""
    changes: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = small(family, value)
        elif name in TOLD:
            changes[name] = TOLD[name]
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            changes[name] = SIZES[name]
        elif name in TOKENS and isinstance(value, int):
            changes[name] = TOKENS.index(name)
    if "kv_lora_rank" in changes:  # latent attention has a key a head
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    taken = inspect.signature(type(default).__init__).parameters
    scales = {name: value for name, value in TOLD.items() if name in taken}
    return type(default)(**changes | scales | OWN.get(family, {}))


def build(family: str) -> PreTrainedModel:
    """fp32, eval mode, weights spread out; whatever transformers raises for it."""
    config = small(family, CONFIG_MAPPING[family]())
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(copy.deepcopy(config)).num_parameters()
    if size > LARGEST:
        raise ValueError(f"{size} parameters, more than {LARGEST}: SIZES lacks a name")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def visit(family: str) -> Row:
    """Build one, patch it, compare."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    try:
        model = build(family)
        with torch.no_grad():
            model(input_ids=torch.arange(10, 18)[None], use_cache=False)
    except Exception as error:  # the walk goes on: the row says what was raised
        return Row(family, name, "not built", f"{type(error).__name__}: {first_line(error)}")
    untouched = copy.deepcopy(model)
    try:
        patch_model(model)
    except ValueError as error:
        return Row(family, name, "refused", first_line(error))
    form = model.forward.keywords["_form"]  # type: ignore[union-attr]
    try:
        check_same(model, untouched)
    except Exception as error:  # the walk goes on, and fails at its end
        return Row(family, name, "wrong", f"{type(error).__name__}: {first_line(error)}")
    return Row(family, name, "served", described(form))


@torch.no_grad()
def check_same(patched: PreTrainedModel, untouched: PreTrainedModel) -> None:
    """The log-probabilities of a served model are those of its own logits."""
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    targets = next_tokens(ids)
    ours = patched(input_ids=ids, targets=targets, temperature=0.7)
    logits = untouched(input_ids=ids, use_cache=False).logits.float() / 0.7
    kept = targets != -100
    logprobs = logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    same = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours.logprobs[kept], logprobs[kept], **same)
    torch.testing.assert_close(ours.lse[kept], logits.logsumexp(-1)[kept], **same)


def described(form: Any) -> str:
    """How the logits follow from the head."""
    parts = ["hidden states scaled"] if form.before != 1.0 else []
    parts += ["scaled"] if form.scale != 1.0 else []
    parts += ["capped"] if form.softcap is not None else []
    return ", ".join(parts) or "plain"


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def table(rows: Sequence[Row]) -> str:
    """The page."""
    count = Counter(row.outcome for row in rows)
    built = count["served"] + count["refused"]
    kinds = Counter(row.why for row in rows if row.outcome == "served")
    lines = [
        "# Architectures",
        "",
        f"Of the {len(rows)} causal LMs of transformers {transformers.__version__} "
        f"(`AutoModelForCausalLM`), {built} build from a tiny configuration and {count['served']} "
        f"of these are served by `patch_model`: "
        f"{', '.join(f'{number} {kind}' for kind, number in kinds.most_common())}. Each one gives "
        "the log-probabilities of its own logits. The others are refused by one sentence.",
        "",
        "`agro train` asks for more, since it packs sequences end to end: a model to which a "
        "packed sequence is not what it is alone is refused, such as recurrent ones (Mamba, Jamba) "
        "and the decoders of Bart's kind.",
        "",
        "Written by `python -m tests.kernels.architectures > docs/architectures.md`.",
        "",
        "| model_type | class | | logits, or the reason |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r.family} | {r.model} | {r.outcome} | {r.why.replace('|', '/')} |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*", help="model_type; none: all")
    chosen = parser.parse_args().families or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = []
    for family in chosen:
        rows.append(visit(family))
        print(*rows[-1], sep="\t", file=sys.stderr, flush=True)
    print(table(rows), end="")
    if wrong := [row.family for row in rows if row.outcome == "wrong"]:
        sys.exit(f"served and wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
