"""A report of training runs: one HTML page that needs nothing but itself.

    python -m adpo_jax.report runs/a runs/b [--out=report.html] [--png=FOLDER]

`runs` reads run folders, `figures` draws (matplotlib, the extra [report]), `page` puts a page
together.
"""
