"""Templates and blueprints described in Python, and written as ComfyUI's front end saves them.

graph.py has the words of the description, boxes.py and templates.py use them, saved.py writes the JSON.
"""
