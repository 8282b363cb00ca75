"""linear_topk in blocked plain torch: the largest of each tile of logits, merged.

Letters: N tokens, V vocabulary.
"""

import torch
from torch import Tensor

from agro_kernels._torch.linear_logprobs import LOWEST_MAX, tiles, upcast
from agro_kernels.arguments import check_token_temperature_values
from agro_kernels.head import Head

NO_ID = -1


def linear_topk(head: Head, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs (N, k), ids (N, k) int64, lse (N,)), largest first; the targets are not looked at.

    An entry without a probability, of a row that has fewer than k with one, is -inf and NO_ID.
    """
    check_token_temperature_values(head.token_temperature, head.targets, head.ignore_index)
    head = upcast(head)
    m = head.hidden.new_full(head.targets.shape, LOWEST_MAX)
    s = torch.zeros_like(m)
    best = m.new_full((m.shape[0], k), -torch.inf)
    ids = head.targets.new_full(best.shape, NO_ID, dtype=torch.int64)
    for tile in tiles(head):
        rows, z = tile.rows, tile.logits
        if tile.excluded is not None:
            z.masked_fill_(tile.excluded, -torch.inf)
        of_tile, columns = z.topk(min(k, z.shape[1]), dim=1)
        both = torch.cat([best[rows], of_tile], 1)
        both_ids = torch.cat([ids[rows], columns + tile.entries.start], 1)
        best[rows], order = both.topk(k, dim=1)
        ids[rows] = both_ids.gather(1, order)
        m_new = torch.maximum(m[rows], of_tile[:, 0])
        s[rows] = s[rows] * (m[rows] - m_new).exp() + z.sub_(m_new.unsqueeze(1)).exp_().sum(1)
        m[rows] = m_new
    log_s = s.log()
    ids = ids.where(best != -torch.inf, NO_ID)
    return (best - m.unsqueeze(1)) - log_s.unsqueeze(1), ids, m + log_s
