"""A pretrained sentence encoder, fine-tuned in full and by LoRA on texts by topic; other topics and languages to tell.

And a small causal model trained here on the same texts: one of some answers, and free text. Everything runs on
``--device cuda`` too; ``NULLBAYES_LANGUAGE`` names a folder that stands in for the encoder's package and the texts.
"""

from __future__ import annotations

from experiments.language.running import NAME, jobs, report

__all__ = ["NAME", "jobs", "report"]
