"""What people read: tables, plots, the HTML page, the model card."""
