"""Distillation from a teacher's top-k: its k most likely ids and their probabilities are enough.

That is what an inference server sends, too. The student learns the teacher's distribution over
those ids, renormalised. It prints the KL divergence from it to the student's distribution, in nats
a token, which falls towards 0.
"""

import argparse

import small_model
import torch

from agro_kernels import linear_logprobs, linear_topk

VOCABULARY, TOP_K = 512, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    torch.manual_seed(0)
    teacher, student = (
        small_model.llama(VOCABULARY, size, initializer_range=0.1) for size in (128, 64)
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    ids = torch.randint(VOCABULARY, (8, 16))
    with torch.no_grad():  # log-probabilities and ids of the k largest, (8, 16, k)
        states = teacher.model(input_ids=ids).last_hidden_state
        top = linear_topk(states, teacher.lm_head.weight, TOP_K)
    probabilities = top.logprobs.softmax(-1)
    for step in range(1, options.steps + 1):
        hidden = student.model(input_ids=ids).last_hidden_state
        logprobs = linear_logprobs(hidden, student.lm_head.weight, top.ids)  # one pass for all k
        loss = (probabilities * (probabilities.log() - logprobs)).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: KL {loss.item():.3f}")


if __name__ == "__main__":
    main()
