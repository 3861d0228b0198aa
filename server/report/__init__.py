"""Results to tables, plots and one page."""
