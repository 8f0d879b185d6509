"""The two sides of a student: ViLT-shaped towers (the paper's), and any encoder of Hugging Face behind one contract."""
