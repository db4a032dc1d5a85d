"""The commands of ``memfit``, one a file: ``add`` tells the parser of it, ``run`` runs it.

Depends on the planner and on the rest of the integrations.
"""
