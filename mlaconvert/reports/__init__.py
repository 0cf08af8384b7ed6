"""What people read: tables for the terminal, plots, the HTML page, the model card.

What an evaluation shows is defined in `mlaconvert.evaluation.figures`; here is how it looks.
"""
