"""What every room uses: argument checks, memory, progress, files."""
