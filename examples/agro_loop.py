"""AGRO in a plain loop: sample, score under policy and reference, one update, again.

The reward is the share of even ids in a completion. It prints the mean reward of each step, about
0.5 at first and above 0.8 after 20 steps, and the policy's distance from the reference in nats a
completion.
"""

import argparse
import copy

import small_model
import torch

from agro_kernels import agro_coefficients, next_tokens, patch_model

VOCABULARY, PROMPTS, GENERATIONS, TOKENS, BETA = 128, 8, 8, 8, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = small_model.llama(VOCABULARY, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    policy = patch_model(model)  # or that of AutoModelForCausalLM.from_pretrained(...)
    reference = copy.deepcopy(policy).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    groups = torch.arange(PROMPTS).repeat_interleave(GENERATIONS)  # which prompt each row has
    for step in range(1, options.steps + 1):
        prompts = torch.randint(1, VOCABULARY, (PROMPTS, 4))[groups]
        ids = policy.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=TOKENS,
        )
        rewards = (ids[:, 4:] % 2 == 0).float().mean(1)  # yours: one number a completion
        completion = torch.zeros_like(ids, dtype=torch.bool)
        completion[:, 4:] = True
        inputs = {"input_ids": ids, "targets": next_tokens(ids, completion)}
        with torch.no_grad():
            scores = policy(**inputs).logprobs.double().sum(1)
            ref_scores = reference(**inputs).logprobs.double().sum(1)
        coefficients, _ = agro_coefficients(
            rewards, scores, ref_scores, groups, beta=BETA, scale=1 / BETA
        )
        loss = (coefficients * policy(**inputs).logprobs.sum(1)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kl = (scores - ref_scores).mean()
        print(f"step {step}: KL {kl:.2f}, reward {rewards.mean():.3f}")


if __name__ == "__main__":
    main()
