"""Fused loss ops for reinforcement-learning fine-tuning of language models with AGRO."""

from agro_kernels.agro_loss import (
    AgroCoefficients,
    AgroStats,
    agro_coefficients,
    agro_loss,
    linear_agro_loss,
)
from agro_kernels.cross_entropy import linear_cross_entropy
from agro_kernels.divergences import linear_jsd, linear_kl
from agro_kernels.head import IGNORE_INDEX
from agro_kernels.linear_logprobs import (
    LogprobStats,
    LogprobsWithEntropy,
    linear_logprobs,
    linear_logprobs_with_entropy,
    linear_logprobs_with_stats,
    tail_probability,
)
from agro_kernels.linear_topk import TopLogprobs, linear_topk
from agro_kernels.model_head import ModelHead
from agro_kernels.modules import LinearAgroLoss, LogprobHead, next_tokens, patch_model
from agro_kernels.packing import pack_sequences
from agro_kernels.policy_gradient import (
    POLICY_GRADIENT_FORMS,
    policy_gradient_coefficients,
    reward_to_go_coefficients,
)
from agro_kernels.selective_logprobs import selective_logprobs, selective_logprobs_with_stats
from agro_kernels.weighted_logprobs import weighted_logprob_sum

__all__ = [
    "IGNORE_INDEX",
    "POLICY_GRADIENT_FORMS",
    "AgroCoefficients",
    "AgroStats",
    "LinearAgroLoss",
    "LogprobHead",
    "LogprobStats",
    "LogprobsWithEntropy",
    "ModelHead",
    "TopLogprobs",
    "agro_coefficients",
    "agro_loss",
    "linear_agro_loss",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_kl",
    "linear_logprobs",
    "linear_logprobs_with_entropy",
    "linear_logprobs_with_stats",
    "linear_topk",
    "next_tokens",
    "pack_sequences",
    "patch_model",
    "policy_gradient_coefficients",
    "reward_to_go_coefficients",
    "selective_logprobs",
    "selective_logprobs_with_stats",
    "tail_probability",
    "weighted_logprob_sum",
]
