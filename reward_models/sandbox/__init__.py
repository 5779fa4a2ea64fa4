"""Two confined processes: ``program`` runs a submitted program, and ``checker`` runs its tests.

``code_runner`` starts the processes, which import only the standard library. They exchange plain
data (``plain``) over a ``channel``; ``confinement`` restricts each of them.
"""
