"""A training loop of your own: the head's log-probabilities from one op, without any logits.

A small Llama with random weights learns to count, from ids that go up by one. It prints the mean
cross-entropy of each step, in nats: ln 512 = 6.24 at first, under 0.3 after 60 steps.
"""

import argparse

import small_model
import torch

from agro_kernels import linear_logprobs

VOCABULARY = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    torch.manual_seed(0)
    # Or AutoModelForCausalLM.from_pretrained(...): `model.model` is what gives the hidden states.
    model = small_model.llama(VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, options.steps + 1):
        first = torch.randint(VOCABULARY, (32, 1))
        ids = (first + torch.arange(25)) % VOCABULARY  # (32, 25)
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state  # (32, 24, 64)
        # The state at t predicts the token at t + 1: the shift is the caller's.
        logprobs = linear_logprobs(hidden, model.lm_head.weight, ids[:, 1:])  # (32, 24) fp32
        loss = -logprobs.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
