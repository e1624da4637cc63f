"""What a bundle is on disk: manifest, hashes, whole files, plan profiles, decode states."""
