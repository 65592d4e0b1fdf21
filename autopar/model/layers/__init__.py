"""Operations of the parts of a transformer: what ``autopar.model.build`` puts together."""
