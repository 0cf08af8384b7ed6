"""Clips for calibrating, healing and evaluating: stored, drawn, encoded from videos, or made by a teacher."""
