"""The exceptions that fxmask raises on purpose, under one root."""

from __future__ import annotations


class FxmaskError(Exception):
    """Root of every error that fxmask raises on purpose."""


class CaptureError(FxmaskError):
    """The model could not be turned into a graph that computes the same thing."""


class InputError(FxmaskError, ValueError):
    """Arguments of the denoiser or of a public function are missing or contradictory."""


class SchedulerError(FxmaskError, ValueError):
    """The scheduler does not offer what sampling needs (``timesteps``, ``step``)."""


class MaskError(FxmaskError, ValueError):
    """A mask or forecast is malformed or does not fit the program."""


class OutcomeError(FxmaskError, ValueError):
    """The asked-for outcome (speed-up, MACs, error) is contradictory or out of reach."""


class PassError(FxmaskError):
    """A pass was given a program that violates what it requires, or broke what it ensures."""


class BackendError(FxmaskError):
    """A backend is unknown or cannot compile on this machine."""


class DistributedError(FxmaskError, RuntimeError):
    """Another rank of a distributed learning run died, or did not answer in time."""
