"""Says what helps where macOS has stopped work on the GPU that kept the screen waiting.

macOS ends a command buffer of Metal that runs too long while the display needs the GPU. mlx then raises a RuntimeError
that names the macOS error "Impacting Interactivity" (mlx issue 3267). No Mac was at hand when this was written.
"""

SIGNS = ("Impacting Interactivity", "ImpactingInteractivity")
HINT = (
    "macOS has stopped this work because the screen waited for the GPU; what was saved is kept, and the same command"
    " goes on from the last save"
    "\nhint: take less at a time (a smaller --batch-size, --grad-checkpoint), let the display sleep, or set"
    " AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1"
)


def has_stopped(error: RuntimeError) -> bool:
    """Return whether macOS has stopped the work that raised this error."""
    return any(sign in str(error) for sign in SIGNS)
