"""agro_kernels needs torch alone, and shows its public names and nothing else."""

import subprocess
import sys

import agro_kernels

PUBLIC = set(
    """
    IGNORE_INDEX POLICY_GRADIENT_FORMS AgroCoefficients AgroStats LinearAgroLoss LogprobHead
    LogprobStats LogprobsWithEntropy ModelHead TopLogprobs agro_coefficients agro_loss
    linear_agro_loss
    linear_cross_entropy linear_jsd linear_kl linear_logprobs linear_logprobs_with_entropy
    linear_logprobs_with_stats linear_topk next_tokens pack_sequences patch_model
    policy_gradient_coefficients reward_to_go_coefficients selective_logprobs
    selective_logprobs_with_stats tail_probability weighted_logprob_sum
    """.split()
)


def test_public_names() -> None:
    assert set(agro_kernels.__all__) == PUBLIC
    assert len(agro_kernels.__all__) == len(PUBLIC)
    assert all(hasattr(agro_kernels, name) for name in PUBLIC)


def test_imports_with_torch_alone() -> None:
    program = (
        "import sys\n"
        "for name in ('triton', 'transformers', 'accelerate', 'datasets', 'numpy', 'agro_train'):\n"
        "    sys.modules[name] = None\n"
        "import torch, agro_kernels\n"
        "h, w, t = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])\n"
        "agro_kernels.linear_logprobs(h, w, t)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
