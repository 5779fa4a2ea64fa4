"""Two confined processes: ``program`` runs a submitted program, and ``checker`` runs its tests.

``code_runner`` starts the processes, whose own code needs only the standard library. The processes
exchange plain data (``plain``) over a ``channel``. ``confinement`` restricts each process.
"""
