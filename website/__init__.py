"""What the documentation site is built with, besides MkDocs: see mkdocs.yml."""
