"""How close a converted model is to its teacher, what it saves, and how fast it is."""
