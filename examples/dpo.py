"""DPO from the ops: a patched model gives log-probabilities, the loss is two lines of torch.

The chosen completions have even ids, the rejected ones odd ids. It prints the loss, ln 2 = 0.693 at
first, and the mean margin of the implicit rewards, beta * (chosen - rejected), which grows.
"""

import argparse
import copy

import small_model
import torch
import torch.nn.functional as F

from agro_kernels import next_tokens, patch_model

VOCABULARY, PROMPT, COMPLETION, BETA = 512, 8, 12, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = small_model.llama(VOCABULARY)
    policy = patch_model(model)  # or that of AutoModelForCausalLM.from_pretrained(...)
    reference = copy.deepcopy(policy).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for step in range(1, options.steps + 1):
        prompts = torch.randint(VOCABULARY, (8, PROMPT))
        chosen = 2 * torch.randint(VOCABULARY // 2, (8, COMPLETION))
        rejected = chosen + 1
        ids = torch.cat(  # 8 chosen ones, then their 8 rejected ones
            [torch.cat([prompts, chosen], 1), torch.cat([prompts, rejected], 1)]
        )
        counted = torch.zeros_like(ids, dtype=torch.bool)
        counted[:, PROMPT:] = True
        inputs = {"input_ids": ids, "targets": next_tokens(ids, counted)}
        with torch.no_grad():
            ref_logprobs = reference(**inputs).logprobs  # (16, T), 0.0 on the prompts
        log_ratios = (policy(**inputs).logprobs - ref_logprobs).sum(-1)
        better, worse = log_ratios.chunk(2)
        margin = BETA * (better - worse)
        loss = -F.logsigmoid(margin).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: margin {margin.mean().item():.3f}, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
