"""What ``scripts/site.sh`` makes of the documents beyond Markdown: ``mkdocs.yml`` names ``hooks.py``."""
