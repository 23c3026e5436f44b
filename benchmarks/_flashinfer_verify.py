"""FlashInfer's verification and paged attention as peers (`pip install flashinfer-python==0.6.6`), on one GPU.

At the first use FlashInfer compiles its kernels with nvcc: about a minute each.
"""

from __future__ import annotations

import torch


def chain_speculative(target, tokens, draft_probs, seed, step, temperature) -> torch.Tensor:
    """Exact rejection, tokens [B, k + 1] padded with -1: its softmax with temperature, then its chain kernel.

    Args:
        target: logits [B, k + 1, V]. FlashInfer's softmax takes float32; the conversion counts, engines have to do it.
        draft_probs: [B, k, V] in float32, made beforehand: whoever drafted has them.
    """
    from flashinfer.sampling import chain_speculative_sampling, softmax

    batch, rows, vocab = target.shape
    probs = softmax(target.view(-1, vocab).float(), temperature.repeat_interleave(rows))
    # Tensors for seed and offset: what a captured graph needs to draw anew.
    out, _, _ = chain_speculative_sampling(
        draft_probs, tokens, probs.view(batch, rows, vocab), seed=seed, offset=step.to(torch.int64)
    )
    return out


class PagedAttention:
    """FlashInfer's append attention (FlashAttention-2, split over the context) on a paged cache, captured in graphs.

    Args:
        table: pages of each sequence [B, pages], int32; all full: the context is a multiple of the page.
        new, heads, kv_heads, dim: of q [B, new, heads, dim].
        page: tokens of a page.
    """

    def __init__(self, table, new, heads, kv_heads, dim, page, dtype):
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        batch, pages = table.shape
        self.table = table

        def ints(values):
            return torch.as_tensor(values, dtype=torch.int32, device=table.device)

        starts = (torch.arange(batch + 1) * new, torch.arange(batch + 1) * pages)
        queries, firsts, last = ints(starts[0]), ints(starts[1]), ints([page] * batch)
        self.wrapper = BatchPrefillWithPagedKVCacheWrapper(
            torch.empty(512 << 20, dtype=torch.uint8, device=table.device),
            "NHD",
            use_cuda_graph=True,
            qo_indptr_buf=torch.empty_like(queries),
            paged_kv_indptr_buf=torch.empty_like(firsts),
            paged_kv_indices_buf=torch.empty_like(table.flatten()),
            paged_kv_last_page_len_buf=torch.empty_like(last),
            backend="fa2",  # the FlashAttention-3 kernels do not split the context
        )
        self.wrapper.plan(
            queries, firsts, table.flatten(), last, heads, kv_heads, dim, page,
            causal=True, q_data_type=dtype, kv_data_type=dtype,
        )  # fmt: skip

    def __call__(self, q, k, v) -> torch.Tensor:
        """q [B, new, heads, dim], k and v [pages, page, kv_heads, dim] -> [B, new, heads, dim]."""
        return self.wrapper.run(q.flatten(0, 1), (k, v)).view(q.shape)
