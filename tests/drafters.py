"""Models whose MTP layers guess some tokens right and some wrong, and prompts of theirs."""

import functools

import torch
from generations import model

from fathom import FathomForCausalLM
from fathom.modeling.drafting import DraftDecodingOutput

NEW = 40
VOCABULARY = 12


@functools.cache
def drafter(generation: str, depths: int) -> FathomForCausalLM:
    """Has begun to learn to count in steps of 1 to 3, from noisy texts: some of its drafts are right, some are not."""
    ours = model(generation, num_nextn_predict_layers=depths, vocab_size=VOCABULARY, pad_token_id=0).train()
    optimizer, random = torch.optim.AdamW(ours.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for _ in range(30):
        start, step = (torch.randint(1, high, (8, 1), generator=random) for high in (VOCABULARY, 4))
        texts = (start + step * torch.arange(24)) % (VOCABULARY - 1) + 1
        noise = torch.randint(1, VOCABULARY, texts.shape, generator=random)
        texts = texts.where(torch.rand(texts.shape, generator=random) > 0.1, noise)
        ours(texts, labels=texts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return ours.eval()


def prompts(rows: int = 4, length: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = (torch.arange(length) >= torch.tensor([0, 5, 2, 9])[:rows, None]).long()
    return ids.masked_fill(mask == 0, 0), mask


def drafted(ours: FathomForCausalLM, ids: torch.Tensor, mask: torch.Tensor, **settings) -> DraftDecodingOutput:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **settings}
    return ours.generate(ids, attention_mask=mask, use_mtp=True, return_dict_in_generate=True, **settings)
