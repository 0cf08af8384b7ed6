"""Short trainings that bring a converted model back to its teacher, and on to a few-step student."""
