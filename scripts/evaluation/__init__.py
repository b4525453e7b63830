"""The bench: what scripts/evaluate.py makes, measures and shows.

rows.py says how each row's picture is made, cells.py makes and keeps them, measures.py and networks.py are the columns,
rivals.py is the stylisation in one pass, report.py the table and goals, sheet.py the pictures.
"""
