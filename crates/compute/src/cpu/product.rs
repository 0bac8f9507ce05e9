//! Matrix products: the one door to the `gemm` crate.

use gemm::Parallelism;

/// A matrix view: element `(row, column)` is `values[row * row_stride + column * column_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

/// A matrix view to write to, row-major.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    values: &'a mut [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major and dense.
    pub fn rows(values: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// Row-major, rows `row_stride` apart.
    pub fn strided(values: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self {
            values,
            rows,
            columns,
            row_stride,
            column_stride: 1,
        }
    }

    /// The same elements with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self {
            values: self.values,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    fn in_bounds(&self) -> bool {
        in_bounds(
            self.values.len(),
            (self.rows, self.row_stride),
            (self.columns, self.column_stride),
        )
    }
}

impl<'a> MatrixMut<'a> {
    /// Row-major and dense.
    pub fn rows(values: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Self::strided(values, rows, columns, columns)
    }

    /// Row-major, rows `row_stride` apart.
    pub fn strided(values: &'a mut [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self {
            values,
            rows,
            columns,
            row_stride,
        }
    }
}

fn in_bounds(len: usize, rows: (usize, usize), columns: (usize, usize)) -> bool {
    rows.0 == 0 || columns.0 == 0 || (rows.0 - 1) * rows.1 + (columns.0 - 1) * columns.1 < len
}

/// `c = factor a b`, or `c += factor a b` when it accumulates.
pub fn multiply(
    a: Matrix<'_>,
    b: Matrix<'_>,
    factor: f32,
    c: MatrixMut<'_>,
    accumulate: bool,
    threads: usize,
) {
    assert_eq!(
        (a.rows, b.columns, a.columns),
        (c.rows, c.columns, b.rows),
        "dimensions agree"
    );
    assert!(
        a.in_bounds() && b.in_bounds(),
        "operands lie within their buffers"
    );
    assert!(
        c.columns <= c.row_stride || c.rows <= 1,
        "rows of the result do not overlap"
    );
    assert!(in_bounds(
        c.values.len(),
        (c.rows, c.row_stride),
        (c.columns, 1)
    ));
    let parallelism = if threads > 1 {
        Parallelism::Rayon(threads)
    } else {
        Parallelism::None
    };
    #[expect(unsafe_code, reason = "the crate's product takes pointers")]
    // SAFETY: the assertions above keep every element that the strides reach within its slice,
    // the result's elements are distinct, and the borrows keep it apart from the operands.
    unsafe {
        gemm::gemm(
            c.rows,
            c.columns,
            a.columns,
            c.values.as_mut_ptr(),
            1,
            c.row_stride as isize,
            accumulate,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}
