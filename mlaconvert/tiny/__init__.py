"""The small trained model that ships with mlaconvert, and the clips that it was trained on."""
