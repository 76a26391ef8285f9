"""Sample quality: FID, KID, IS, precision and recall through torch-fidelity, with the protocol stated."""
