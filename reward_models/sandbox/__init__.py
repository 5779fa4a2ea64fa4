"""Two confined processes: ``program`` runs a submitted program, and ``checker`` runs its tests.

``code_runner`` starts the processes, which import only the standard library. The processes exchange
plain data (``plain``) over a ``channel``. ``confinement`` restricts each process.
"""
