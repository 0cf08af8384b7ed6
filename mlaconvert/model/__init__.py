"""The transformer itself: window, cache, attention, blocks, schedule and rollout."""
