"""The commands of ``python -m trio_uring``, each in a module that only it imports."""
