"""What people read: tables for the terminal, plots, the HTML page, the model card.

What an evaluation shows is defined in `mlaconvert.evaluation.figures`; here is how it looks.

    from rich.console import Console

    from mlaconvert.conversion.analyze import analyze
    from mlaconvert.families.open import open_checkpoint
    from mlaconvert.reports.tables import analysis_table

    with open_checkpoint("tiny") as checkpoint:
        Console().print(analysis_table(analyze(checkpoint)))
"""
