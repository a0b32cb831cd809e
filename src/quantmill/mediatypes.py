"""Media types of a manifest and its entries: what the bytes under a digest are."""

from __future__ import annotations

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
"""The manifest itself, as written."""

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
"""The manifest itself, as other tools may write it; accepted when reading."""

CONFIG = "application/vnd.docker.container.image.v1+json"
"""The config blob (modelconfig.py)."""

TENSOR = "application/vnd.ollama.image.tensor"
"""A tensor file with one planned weight, or an expert stack."""

JSON = "application/vnd.ollama.image.json"
"""A JSON file of the checkpoint, under its path-style name."""

MODEL = "application/vnd.ollama.image.model"
"""Weights in one GGUF file."""

DRAFT = "application/vnd.ollama.image.draft"
"""A draft model in one GGUF file."""

ADAPTER = "application/vnd.ollama.image.adapter"
"""A LoRA adapter in one GGUF file."""

PROJECTOR = "application/vnd.ollama.image.projector"
"""A vision projector in one GGUF file."""

TEMPLATE = "application/vnd.ollama.image.template"
"""Prompt template text."""

PROMPT = "application/vnd.ollama.image.prompt"
"""Prompt template text, under its old name."""

SYSTEM = "application/vnd.ollama.image.system"
"""System prompt text."""

LICENSE = "application/vnd.ollama.image.license"
"""Licence text; a manifest may hold several."""

PARAMS = "application/vnd.ollama.image.params"
"""A JSON object of run parameters."""

MESSAGES = "application/vnd.ollama.image.messages"
"""A JSON array of messages with role and content."""

EMBED = "application/vnd.ollama.image.embed"
"""Deprecated; readers skip it."""

FILE = "application/vnd.quantmill.image.file"
"""A file a runtime reads that is not JSON (chat_template.jinja, tokenizer.model); ours alone."""

JSON_TYPES = frozenset({CONFIG, JSON, PARAMS, MESSAGES})
"""Entries whose content must be JSON."""
