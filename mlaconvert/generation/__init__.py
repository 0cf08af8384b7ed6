"""Videos from a model: prompts, rollout through the cache, pictures and movies."""
