"""A method is one file here, which is found by its name: its losses, its generator, its recipes.

To add ZAQ, write ``zaq.py`` with

* a frozen dataclass of the published constants with the three calls of
  :class:`baselines.training.trainer.Method`. ``make_generator`` gives a module of its own or one of
  :mod:`baselines.training.generators`; ``module.sample(n, rng)`` draws for n images a tuple of the
  inputs of its forward, and their labels. ``generator_terms`` and ``student_terms`` give the
  losses, scalar tensors by name, of which the loop minimises the sum; the generator's are asked for
  from the first step on, the student's after the warm-up. Fields called ``width`` and
  ``latent_dim`` make the generator small in tests;
* ``paper(image_size)`` and ``quick(image_size)``, each a pair of that and of a
  :class:`baselines.training.recipe.Recipe`: as published, and for two CPU cores.

No other file changes: ``python -m pytest tests/baselines -k zaq`` runs the tests that every method
passes, ``python benchmarks/compare.py --baseline zaq`` trains it, with hooks, checkpoints, export.
"""
