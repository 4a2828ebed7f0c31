"""fp64 meaning of mla_cache_write: row slot[t] of the cache becomes [RMSNorm(kv[t, :L]) * weight, kv[t, L:]]."""

import torch

# Rounding the output alone costs 1.7e-3 in bf16 and 2.1e-4 in fp16.
MAX_R = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}


def mla_cache_write(kv, norm_weight, eps, cache, slot_mapping):
    """Returns the new cache in fp64, shape [pages, page_size, L + R]."""
    new, latent_dim = cache.double().clone(), norm_weight.shape[0]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            latent = kv[token, :latent_dim].double()
            latent = latent / torch.sqrt(latent.pow(2).mean() + eps) * norm_weight.double()
            new[slot // cache.shape[1], slot % cache.shape[1]] = torch.cat([latent, kv[token, latent_dim:].double()])
    return new
